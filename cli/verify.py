"""`minigpt3d verify`: check that a model computes here what it computed where it was made."""

from dataclasses import dataclass
from pathlib import Path

from minigpt3d.arguments import option

from .console import complain


HELP = "check that a converted model computes here what it computed where it was made"
DESCRIPTION = (
    "Send a fixed cloud and prompt through a model, loaded without this package, and compare the result with the "
    "verification.json of its folder."
)
EPILOG = "Exit code: 0 if they agree, 1 if they differ or there is nothing to compare with."


@dataclass(kw_only=True)
class Options:
    model: str = option("folder or Hub id", positional=True, metavar="DIR_OR_ID")
    trust_remote_code: bool = option(
        "run the code of the model even if it is not the code of this package", default=False
    )


def run(options: Options, argv: list[str]) -> int:
    """Compare a model with its verification.json; returns the exit code."""
    from minigpt3d.conversion import verification
    from minigpt3d.hub import find_model, has_package_code, is_hub_id

    if not Path(options.model).is_dir() and not is_hub_id(options.model):
        raise ValueError(f"there is no folder {options.model}, and a model on the Hub is named OWNER/NAME")
    if not options.trust_remote_code:
        code = find_model(options.model).base if Path(options.model).is_dir() else options.model
        if not has_package_code(code):
            raise ValueError(f"{code} comes with its own code, which would be run: pass --trust-remote-code")
    stored = verification.read_stored(options.model)
    computed = verification.compute(options.model)
    print(verification.to_text(computed))
    if stored is None:
        raise ValueError(
            f"{options.model} has no {verification.VERIFICATION_FILE}, so there is nothing to compare with "
            "(minigpt3d convert --verify writes one)"
        )
    differences = verification.differences(computed, stored)
    for line in differences:
        complain(line)
    if differences:
        versions = ", ".join(f"{name} {number}" for name, number in stored["versions"].items())
        raise ValueError(f"{options.model} computes something else here than where it was made (with {versions})")
    if computed["text"] == stored["text"]:
        print("agrees with verification.json")
    else:
        print(f"stored    {stored['text']!r}")
        print("the numbers agree with verification.json; the text differs, which rounding may explain")
    return 0
