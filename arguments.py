"""Command lines made from dataclasses: each option is written once, as a field with its help.

`minigpt3d` spells options with hyphens (`--max-new-tokens`), training stages with underscores as transformers does
(`--output_dir`); both spellings are accepted by both. Libraries name an argument in backticks in their errors, which
`with_flags` turns into the option that the user typed.
"""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from minigpt3d.messages import one_line


class Parser(argparse.ArgumentParser):
    """Errors name the mistake and point to `--help`, instead of listing all options."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args=None, namespace=None):
        self._words = sys.argv[1:] if args is None else args
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:  # reported here, because a command's parser knows its own name
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str):
        files = [word for word in self._words if re.match(r"-[^=]*\.[A-Za-z]\w*$", word)]
        files += [word for word in self._words if word.startswith("-") and os.path.exists(word)]
        hint = f" (a file of this name is written ./{files[0]})" if files else ""
        missing = re.match("argument (--[^ ]+): expected", message)
        if missing and not hint:
            following = [
                after for word, after in pairwise(self._words) if word == missing[1] and re.match("-[^-]", after)
            ]
            hint = f" (a name that begins with '-' is written {missing[1]}={following[0]})" if following else ""
        self.exit(2, f"{self.prog}: {message}{hint}\nRun `{self.prog} --help` for the options.\n")


def option(help: str, default: Any = dataclasses.MISSING, **settings) -> Any:
    """A dataclass field that is a command-line option.

    Args:
        help: one sentence for `--help`.
        default: a default of None or an empty list or dict means "not given"; without a default the option is required.
        settings: of `argparse.add_argument` (metavar, choices, type, action, nargs), and `positional=True` or
            `group="title"`.
    """
    metadata = {"help": help} | settings
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str, separator: Literal["-", "_"]) -> str:
    """The option of a field; a field whose name is a Python keyword ends in "_": `from_` → --from."""
    return "--" + name.rstrip("_").replace("_", separator)


def add_options(parser: argparse.ArgumentParser, options: type, separator: Literal["-", "_"] = "-"):
    """Add every field of a dataclass made with `option` to a parser.

    Args:
        separator: between the words of an option.
    """
    hints, groups = get_type_hints(options), {None: parser}
    for field in dataclasses.fields(options):
        if "help" not in field.metadata:
            continue
        settings = dict(field.metadata)
        title, positional = settings.pop("group", None), settings.pop("positional", False)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        settings = _argparse_settings(hints[field.name], settings)
        settings["help"] = with_flags(settings["help"], options, separator)
        if positional:
            groups[title].add_argument(field.name, **settings)
            continue
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            settings["required"] = True
        elif field.default not in (dataclasses.MISSING, None, "") and field.default is not False:
            settings["help"] += f" (default: {field.default})"
        groups[title].add_argument(flag(field.name, separator), dest=field.name, default=None, **settings)


def _argparse_settings(hint: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `add_argument` from an annotation (`int | None`, `list[Path]`, `Literal["a", "b"]`, `bool`) and what
    the field sets itself."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(part for part in get_args(hint) if part is not NoneType)
    if hint is bool:
        return {"action": "store_true"} | settings
    if get_origin(hint) is Literal:
        return {"choices": list(get_args(hint))} | settings
    if get_origin(hint) is list:
        count = {} if settings.get("action") == "append" else {"nargs": "+"}
        return count | _argparse_settings(get_args(hint)[0], settings)
    parsers = {str: non_empty, Path: lambda text: Path(non_empty(text))}
    return ({"type": parsers.get(hint, hint)} if isinstance(hint, type) else {}) | settings


def read_options(options: type, args: argparse.Namespace) -> Any:
    """An instance of the dataclass from parsed arguments; what was not given keeps its default."""
    names = [field.name for field in dataclasses.fields(options) if "help" in field.metadata]
    return options(**{name: getattr(args, name) for name in names if getattr(args, name) is not None})


def normalize(argv: Sequence[str], separator: Literal["-", "_"]) -> list[str]:
    """Arguments with the words of every option joined by `separator`, however they were typed; what follows `--` stays."""
    other = "_" if separator == "-" else "-"
    end = argv.index("--") if "--" in argv else len(argv)

    def spelled(word: str) -> str:
        name, equals, value = word.partition("=")
        return "--" + name[2:].replace(other, separator) + equals + value if re.match(r"--[a-z]", word) else word

    return [*map(spelled, argv[:end]), *argv[end:]]


def with_flags(message: str, options: type, separator: Literal["-", "_"]) -> str:
    """A library's message with every field of `options` in backticks replaced by its option: `data` → --data."""
    names = [field.name for field in dataclasses.fields(options)]
    return re.sub(r"`(\w+)`", lambda match: flag(match[1], separator) if match[1] in names else match[0], message)


def run_script(
    action: Callable, options: type, argv: Sequence[str] | None, description: str, module: str | None = None
):
    """Parse the command line of a script and call `action` with its options.

    Args:
        options: a dataclass of `option` fields.
        argv: arguments; `sys.argv[1:]` if None.
        description: for `--help`; if it has several lines, they are kept.
        module: that `python -m` runs; the script's file if None.

    Raises:
        SystemExit: 2 for options that cannot be parsed, 1 with the message of a ValueError or OSError on one line.
    """
    parser = Parser(prog=module and f"python -m {module}", description=description)
    if "\n" in description:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_options(parser, options, "_")
    parsed = parser.parse_args(normalize(sys.argv[1:] if argv is None else argv, "_"))
    try:
        action(read_options(options, parsed))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {with_flags(one_line(error), options, '_')}")


def non_empty(text: str) -> str:
    """A text, for argparse."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def path_or_url(text: str) -> Path | str:
    """A path, or a URL as text, for argparse; a `Path` would lose a slash of a URL."""
    return text if re.match(r"[A-Za-z][\w+.-]*://", text) else Path(non_empty(text))


def natural_int(text: str, at_least: int = 0) -> int:
    """A whole number of at least `at_least`, for argparse."""
    if not text.isdecimal() or int(text) < at_least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {at_least}, got {text!r}")
    return int(text)


def positive_int(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    return natural_int(text, at_least=1)


def number_between(low: float, high: float) -> Callable[[str], float]:
    """A parser of numbers in [low, high], for argparse."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}, got {text!r}")
        return number

    return parse
