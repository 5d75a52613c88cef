"""Files and folders that appear complete or not at all: written under a temporary name, then renamed."""

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
