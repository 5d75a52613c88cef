"""Command lines made from dataclasses: each option is written once, as a field with its help.

`minigpt3d` spells options with hyphens (`--max-new-tokens`), training stages with underscores as transformers does
(`--output_dir`); both spellings are accepted by both. Libraries name an argument in backticks in their errors, which
`with_flags` turns into the option that the user typed.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


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


def add_options(parser: argparse.ArgumentParser, options: type, separator: Literal["-", "_"] = "-"):
    """Add every field of a dataclass made with `option` to a parser.

    Args:
        separator: between the words of an option.
    """
    hints, groups = get_type_hints(options), {}
    for field in dataclasses.fields(options):
        if "help" not in field.metadata:
            continue
        settings = dict(field.metadata)
        title, positional = settings.pop("group", None), settings.pop("positional", False)
        target = parser if title is None else groups.setdefault(title, None) or parser.add_argument_group(title)
        if title is not None:
            groups[title] = target
        settings = _argparse_type(hints[field.name]) | settings
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if positional:
            target.add_argument(field.name, **settings)
            continue
        if has_default:
            settings["default"] = None if field.default is dataclasses.MISSING else field.default
            if settings["default"] not in (None, False, ""):
                settings["help"] += f" (default: {settings['default']})"
        else:
            settings["required"] = True
        target.add_argument("--" + field.name.replace("_", separator), dest=field.name, **settings)


def _argparse_type(hint: Any) -> dict[str, Any]:
    """What an annotation says to argparse: `int | None`, `list[Path]`, `Literal["a", "b"]`, `bool`."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = [each for each in get_args(hint) if each is not NoneType]
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) is Literal:
        return {"choices": list(get_args(hint))}
    if get_origin(hint) is list:
        return {"nargs": "+"} | _argparse_type(get_args(hint)[0])
    return {"type": hint} if isinstance(hint, type) and hint is not str else {}


def read_options(options: type, args: argparse.Namespace) -> Any:
    """An instance of the dataclass from parsed arguments; what was not given keeps its default."""
    names = [field.name for field in dataclasses.fields(options) if "help" in field.metadata]
    return options(**{name: getattr(args, name) for name in names if getattr(args, name) is not None})


def normalize(argv: Sequence[str], separator: Literal["-", "_"]) -> list[str]:
    """Arguments with every option's words joined by `separator`, however they were typed."""
    other = "_" if separator == "-" else "-"

    def spelled(word: str) -> str:
        name, equals, value = word.partition("=")
        return "--" + name[2:].replace(other, separator) + equals + value if re.match(r"--[a-z]", word) else word

    return [spelled(word) for word in argv]


def with_flags(message: str, names: Sequence[str], separator: Literal["-", "_"]) -> str:
    """A library's message with every argument in backticks replaced by its option: `data` → --data."""
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return (
        re.sub(rf"`({pattern})`", lambda match: "--" + match[1].replace("_", separator), message)
        if pattern
        else message
    )


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
