"""Texts for people: messages of errors, and command lines that may be published."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit


class MultilineError(ValueError):
    """An error that lists several problems; commands keep the lines of its message."""


def one_line(error: Exception) -> str:
    """The message of an error on one line; an unexpected error is preceded by its class."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {message}"
    is_expected = message and isinstance(error, (OSError, ValueError, ImportError))
    return " ".join((message if is_expected else f"{type(error).__name__}: {message}").split())


def public_command(words: Sequence[str]) -> str:
    """A command line for publication: of a local path only its last part, of a URL neither password nor query."""
    return shlex.join(map(public_word, words))


def public_word(word: str) -> str:
    """One word of `public_command`."""
    option, value = re.fullmatch(r"((?:--[\w-]+=)?(?:[a-z0-9_]+=)?)(.*)", word, re.DOTALL).groups()  # --out=, METRIC=
    if re.match(r"\s*https?://", value, re.IGNORECASE):
        try:
            url = urlsplit(value.strip())
            value = url._replace(netloc=url.netloc.rpartition("@")[2], query="", fragment="").geturl()
        except ValueError:  # malformed, so nobody can use it
            value = "URL"
    elif value.startswith(("/", "~", "file:")) or Path(value).is_absolute() or ".." in Path(value).parts:
        value = Path(value).resolve().name or value
    return option + value
