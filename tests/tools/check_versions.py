"""Print the versions of libraries that are imported, and exit with 1 if one is not the version of a constraints file.

python tests/tools/check_versions.py constraints-oldest.txt --except torch
"""

import argparse
import importlib
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Import each library of the file and compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("constraints", type=Path, help="lines of NAME==VERSION")
    parser.add_argument("--except", dest="excepted", nargs="+", default=[], help="libraries of any version")
    options = parser.parse_args(argv)
    lines = [line for line in options.constraints.read_text().splitlines() if line and not line.startswith("#")]
    others = 0
    for name, expected in (line.split("==") for line in lines):
        found = importlib.import_module(name.replace("-", "_")).__version__
        is_other = found.partition("+")[0] != expected and name not in options.excepted
        others += is_other
        print(f"{name} {found}" + is_other * f", expected {expected}")
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
