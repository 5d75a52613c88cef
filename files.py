"""Files and folders that appear complete or not at all: written under a temporary name, then renamed."""

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str):
    """Write a UTF-8 text file."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_bytes(path: Path, content: bytes):
    """Write a binary file."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(content)
    partial.replace(path)


def write_json(path: Path, content, indent: int | None = 1):
    """Write JSON in UTF-8, with a newline at its end."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


@contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the name of `folder`, and its place, when the block ends without an error.

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
