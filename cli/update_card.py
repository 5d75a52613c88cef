"""`minigpt3d card`: write a model card from the files of a model."""

from dataclasses import dataclass
from pathlib import Path

from minigpt3d.arguments import option


HELP = "write a model card from the files of a model, with a source for each number"
DESCRIPTION = (
    "Write README.md into the folder of a model or an adapter, from its provenance, its training history and the results "
    "of evaluations, with metadata for the Hub; card_sources.json says where each number comes from. The card states what "
    "is not known."
)
EPILOG = (
    'Cost and CO2 need values that no file has, each with its source: --co2 "watts=285:nvidia-smi, mean of the run" '
    '--co2 "pue=1.2:the operator" --co2 "grid=380:the national agency, 2025"; hours, if the history has none.'
)


@dataclass(kw_only=True)
class Options:
    folder: Path = option("folder of a model or an adapter", positional=True, metavar="DIR")
    results: list[Path] = option("folders that `minigpt3d evaluate` wrote", default=[], metavar="DIR")
    co2: list[str] = option(
        "a value for the CO2 estimate, see below; may be repeated",
        default=[],
        action="append",
        metavar="NAME=VALUE:SOURCE",
    )
    ablation: Path | None = option(
        "folder that the household ablation wrote, or its ablation.json; its picture is copied",
        default=None,
        metavar="DIR",
    )
    model_id: str | None = option(
        "Hub id that others load the model by (default: the folder's name)", default=None, metavar="OWNER/NAME"
    )


def run(options: Options, argv: list[str]) -> int:
    """Write the card and print its path; returns the exit code."""
    from minigpt3d.hub import fingerprint_model
    from minigpt3d.model_card.emissions import read_given
    from minigpt3d.model_card.readme import write_card

    given = read_given(options.co2)
    fingerprint = fingerprint_model(options.folder) if options.results and options.folder.is_dir() else None
    print(write_card(options.folder, options.results, given, options.ablation, options.model_id, fingerprint))
    return 0
