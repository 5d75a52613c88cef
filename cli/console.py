"""Output for people: errors and warnings as one line each on standard error, and quiet libraries."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from minigpt3d.arguments import with_flags
from minigpt3d.readers_minigpt3d import printable


FAILED = 1  # exit code
EXIT_CODES = (
    "Exit code: 0; 1 if a file failed, or an option names what cannot be used, such as a table of another format; 2 if the "
    "options cannot be parsed."
)


def complain(message: str):
    """Print a message on standard error, clear of a progress bar; control characters other than newlines are escaped."""
    from tqdm import tqdm

    tqdm.write("\n".join(map(printable, f"minigpt3d: {message}".split("\n"))), file=sys.stderr)


@contextmanager
def warnings_in_one_line(options: type) -> Iterator[None]:
    """Print each warning for users once, on one line, and name the command's options as they are typed; warnings for
    developers (all but `UserWarning`) are printed as before."""
    show, shown = warnings.showwarning, set()

    def show_once(message, category, *where):
        text = " ".join(str(message).split())
        if category is not UserWarning:
            show(message, category, *where)
        elif text not in shown:
            shown.add(text)
            complain(f"warning: {with_flags(text, options, '-')}")

    with warnings.catch_warnings():
        warnings.showwarning = show_once
        yield


def quiet():
    """Silence what libraries print while a model loads; problems are in their exceptions."""
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # reports missing libraries that nobody asked for
