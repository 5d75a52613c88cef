"""Run a command of the recipe: options from a dataclass, errors in one line."""

import argparse
import dataclasses
import sys
from collections.abc import Callable

from minigpt3d.arguments import add_options, normalize, read_options, with_flags
from minigpt3d.messages import one_line


def run_command(
    action: Callable[[object], None], options: type, description: str, module: str, argv: list[str] | None = None
):
    """Parse the command line and call `action` with the options.

    Args:
        options: a dataclass, see `minigpt3d.arguments`.
        description: for `--help`.
        module: that `python -m` runs.
        argv: arguments (default: of this process).

    Raises:
        SystemExit: the action failed; with its error in one line.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, options, "_")
    args = parser.parse_args(normalize(sys.argv[1:] if argv is None else argv, "_"))
    try:
        action(read_options(options, args))
    except (ValueError, OSError) as error:
        names = [field.name for field in dataclasses.fields(options)]
        sys.exit(f"error: {with_flags(one_line(error), names, '_')}")
