"""`minigpt3d compare`: put evaluations side by side."""

from dataclasses import dataclass
from pathlib import Path

from minigpt3d.arguments import option


HELP = "put evaluations side by side, with tests and published figures"
DESCRIPTION = (
    "Put the results of several evaluations in one table for each suite and judge, with paired tests between them. "
    "Published figures are shown beside results of the same judge only."
)


@dataclass(kw_only=True)
class Options:
    folders: list[Path] = option("what `minigpt3d evaluate --out` wrote", positional=True, metavar="DIR")


def run(options: Options, argv: list[str]) -> int:
    """Print the comparison; returns the exit code."""
    from minigpt3d.evaluation.comparison import compare

    print(compare(options.folders))
    return 0
