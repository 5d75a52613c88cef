"""Output for people: errors and warnings as one line each on standard error, and quiet libraries."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields

from minigpt3d.arguments import with_flags


FAILED = 1  # exit code


class CommandError(Exception):
    """A failure whose message is ready for the user; it may have several lines."""


@contextmanager
def line_by_line() -> Iterator[None]:
    """Keep the lines of a ValueError that lists several problems; other errors are printed on one line."""
    try:
        yield
    except ValueError as error:
        raise CommandError(str(error)) from error


def name_flags(message: str, options: type) -> str:
    """A library's message with the arguments in it replaced by the flags of a command."""
    return with_flags(message, [field.name for field in fields(options)], "-")


def complain(message: str):
    """Print a message on standard error, clear of a progress bar."""
    from tqdm import tqdm

    tqdm.write(printable(f"minigpt3d: {message}"), file=sys.stderr)


def printable(text: str) -> str:
    r"""Text that a stream accepts even if a file name in it is not UTF-8: its bytes are written as `\udcff`, as in JSON."""
    return text.encode(errors="backslashreplace").decode()


class ShowWarnings:
    """A `warnings.showwarning` that prints each warning for users once, on one line.

    Args:
        show: prints warnings for developers (all but `UserWarning`).
    """

    def __init__(self, show: Callable):
        self.show, self.shown = show, set()

    def __call__(self, message, category, *where):
        text = " ".join(str(message).split())
        if category is not UserWarning:
            self.show(message, category, *where)
        elif text not in self.shown:
            self.shown.add(text)
            complain(f"warning: {text}")


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Print warnings with `ShowWarnings` inside the block."""
    with warnings.catch_warnings():
        warnings.showwarning = ShowWarnings(warnings.showwarning)
        yield


def quiet():
    """Silence what libraries print while a model loads; problems are in their exceptions."""
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # reports missing libraries that nobody asked for
