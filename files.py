"""Write files and folders that appear complete or not at all, under a temporary name that is changed; read JSON."""

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_file(path: str | Path) -> Iterator[Path]:
    """A temporary path that is renamed to `path` when the block ends without an error, and removed otherwise.

    Each call has its own temporary name, so that threads and processes may write the same file at the same time.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str):
    """Write a UTF-8 text file."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes):
    """Write a binary file."""
    with written_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, content, indent: int | None = 1):
    """Write JSON in UTF-8, with a newline at its end."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def read_json(path: str | Path, expected: type = dict, advice: str = "Write the file again with its command.") -> Any:
    """The value in a JSON file.

    Args:
        expected: type of the value.
        advice: what to do if the file is damaged.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no JSON, or a value of another type.
    """
    return parse_json(Path(path).read_bytes(), str(path), expected, advice)


def read_json_lines(path: str | Path) -> list[dict]:
    """The objects in a file of JSON lines. Raises as `read_json`."""
    lines = Path(path).read_bytes().removesuffix(b"\n").split(b"\n")
    return [parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if lines != [b""]]


def parse_json(text: str | bytes, place: str, expected: type = dict, advice: str = "Write it again.") -> Any:
    """The value of a JSON text; errors begin with its place. Arguments and errors as of `read_json`."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error}). {advice}") from error
    if not isinstance(value, expected):
        names = {dict: "object", list: "list"}
        raise ValueError(f"{place}: expected a JSON {names[expected]}, got {str(value)[:60]!r}. {advice}")
    return value


@contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `folder`, replacing it, when the block ends without an error.

    Raises:
        OSError: the disk is full; nothing that was written is left behind.
    """
    folder = Path(folder).resolve()
    partial = folder.with_name(f".{folder.name}.minigpt3d-partial")
    replaced = folder.with_name(f".{folder.name}.minigpt3d-replaced")
    if replaced.exists() and not folder.exists():  # a run was killed between the two renames below
        replaced.rename(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if re.search("No space left on device|Disk quota exceeded", str(error)):  # safetensors raises its own class
            full = f"the disk of {folder.parent} is full; free some space and run it again"
            raise OSError(errno.ENOSPC, full) from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
