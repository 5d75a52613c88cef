"""`minigpt3d convert`: make a Hub folder of the authors' files, or of a training stage's result."""

import sys
from pathlib import Path

from minigpt3d.conversion.convert_options import ConvertOptions as Options

from .console import FAILED, complain


HELP = "make a Hub folder of the authors' released files, or of a training stage's result"
DESCRIPTION = (
    "Make a folder that transformers loads. Without paths the released files are downloaded, after their names and sizes "
    "were shown and you agreed. Without the files of stages 3 and 4 the result is what training stage I starts from."
)
EPILOG = "Example: minigpt3d convert --out minigpt3d --dtype float16 --verify"


def run(options: Options, argv: list[str]) -> int:
    """Convert; returns the exit code."""
    options.check()
    import torch

    from minigpt3d.conversion import release, write
    from minigpt3d.hub import ADAPTER_DIR, BASE_DIR

    if options.stage_result:
        plan = release.plan_stage_result(options.stage_result, options.router, options.ignore)
    else:
        paths, origins = (options.files, {}) if options.files else download(options.revision, options.yes)
        plan = release.plan_release(paths, origins, options.config, options.router, options.ignore)
    print(release.summary(plan), flush=True)
    lora, exit_code = options.lora or plan.default_lora, 0

    def write_rest(folder: Path):
        nonlocal exit_code
        exit_code = finish(folder, options)

    write.write_release(plan, options.out, getattr(torch, options.dtype), lora, argv, before_rename=write_rest)
    if lora == "keep":
        base = options.out.resolve() / BASE_DIR
        print(f"{options.out / ADAPTER_DIR} names its base as {base}; correct adapter_config.json if you move it")
    print(f"{options.out} is done")
    return exit_code


def download(revision: str | None, yes: bool) -> tuple[dict[str, Path], dict[str, str]]:
    """Show what would be downloaded, ask, and download; returns paths and origins by slot.

    Raises:
        ValueError: the answer is no, or there is no terminal to ask.
    """
    from minigpt3d.conversion.download import fetch, find_release

    release = find_release(revision)
    print(release, flush=True)
    if not yes:
        if not sys.stdin.isatty():
            raise ValueError("nothing was downloaded: there is no terminal to ask for consent; pass --yes")
        if input("Download? [y/N] ").strip().lower() not in ("y", "yes"):
            raise ValueError("nothing was downloaded: the answer was no")
    return fetch(release)


def finish(folder: Path, options: Options) -> int:
    """Write the cards of a new model, and its verification.json if asked for; returns the exit code."""
    from minigpt3d.conversion import verification, write
    from minigpt3d.hub import ADAPTER_DIR, BASE_DIR
    from minigpt3d.model_card.readme import write_card

    for part in (folder, folder / BASE_DIR, folder / ADAPTER_DIR):
        if (part / write.PROVENANCE_FILE).is_file():
            write_card(part, name=options.out.resolve().name)
    if not options.verify:
        return 0
    try:
        computed = verification.compute(folder)
    except verification.KilledError as error:  # keep a result that took hours
        complain(f"not verified: {error}. Verify it on a machine with more memory: minigpt3d verify {options.out}")
        return FAILED
    verification.store(folder, computed)
    print(verification.to_text(computed))
    return 0
