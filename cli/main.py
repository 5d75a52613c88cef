"""The command `minigpt3d`: parser, dispatch, errors and exit codes.

Importing this imports no torch and no transformers, so that `--help` and mistyped commands answer at once. Each command
is a module of its own: HELP, DESCRIPTION, an EPILOG if it needs one, the dataclass `Options`, and `run(options, argv)`,
which gets the command line as it was typed for its records, and returns the exit code.
"""

import argparse
import os
import sys
from importlib.metadata import version

from minigpt3d.arguments import Parser, add_options, normalize, read_options, with_flags
from minigpt3d.messages import MultilineError, one_line

from . import (
    chat,
    classify,
    compare,
    convert,
    describe,
    embed,
    evaluate,
    look,
    new,
    pack,
    page,
    search,
    serve,
    update_card,
    verify,
)
from .console import FAILED, complain, warnings_in_one_line


COMMANDS = {
    "describe": describe,
    "classify": classify,
    "search": search,
    "chat": chat,
    "embed": embed,
    "look": look,
    "demo": page,
    "serve": serve,
    "convert": convert,
    "new": new,
    "verify": verify,
    "pack": pack,
    "evaluate": evaluate,
    "compare": compare,
    "card": update_card,
}
INTERRUPTED = 130  # exit code


class VersionAction(argparse.Action):
    """Print the versions that a bug report needs; nothing is imported for them."""

    def __call__(self, parser, *values):
        print(", ".join(f"{name} {version(name)}" for name in ("minigpt3d", "torch", "transformers")))
        parser.exit()


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="minigpt3d", description="Ask a small language model what a 3D object is.", allow_abbrev=False
    )
    parser.add_argument("--version", action=VersionAction, nargs=0, help="print versions and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command_parser = commands.add_parser(
            name, help=command.HELP, description=command.DESCRIPTION, epilog=getattr(command, "EPILOG", None)
        )
        add_options(command_parser, command.Options)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 if it failed, 130 if it was interrupted. A wrong command line exits with 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(normalize(argv, "-"))
    command = COMMANDS[args.command]
    options = read_options(command.Options, args)
    try:
        with warnings_in_one_line(command.Options):
            return command.run(options, argv)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output has left, for example `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (OSError, ValueError, ImportError) as error:
        message = str(error) if isinstance(error, MultilineError) else one_line(error)
        complain(with_flags(message, command.Options, "-"))
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
