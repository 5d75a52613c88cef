"""Write files and folders that appear complete or not at all, under a temporary name that is changed; read JSON."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


# A limit of the user's (quota, `ulimit -f`) is as good as a full disk. safetensors raises its own class.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_MESSAGES = "No space left on device|Disk quota exceeded|File too large"


def check_new_file(option: str, path: Path, sources: Iterable[Path | str] = ()):
    """
    Args:
        option: that named the file, for messages.
        sources: what is read.

    Raises:
        ValueError: no file can be written there, or it is one of the sources.
    """
    if path.is_dir():
        raise ValueError(f"`{option}` {path} is a folder. Give a file.")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"`{option}` {path}: there is no folder {path.resolve().parent}")
    if any(isinstance(source, Path) and source.resolve() == path.resolve() for source in sources):
        raise ValueError(f"`{option}` {path} is a file to read, which would be lost. Give another name.")


@contextmanager
def written_file(path: str | Path) -> Iterator[Path]:
    """A temporary path that is renamed to `path` when the block ends without an error, and removed otherwise.

    Each call has its own temporary name, so that threads and processes may write the same file at the same time. The
    content is on disk before the rename: after a loss of power there is the old file or the new one.

    Raises:
        OSError: the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # `path` may have the longest name there can be
    try:
        with full_disk_named(path.parent):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            _to_disk(temporary, mode)
            os.replace(temporary, path)
            _to_disk(path.parent)
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
        ValueError: another process is writing this folder.
        OSError: the disk is full; nothing that was written is left behind.
    """
    folder = Path(folder).resolve()
    partial = folder.with_name(f".{folder.name}.minigpt3d-partial")
    replaced = folder.with_name(f".{folder.name}.minigpt3d-replaced")
    with locked(folder):
        if replaced.exists() and not folder.exists():  # a run was killed between the two renames below
            replaced.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            with full_disk_named(folder.parent):
                yield partial
                folder_to_disk(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        rename_folder(partial, folder)
        shutil.rmtree(replaced, ignore_errors=True)


def folder_to_disk(folder: Path):
    """Wait until all files of a folder, with the mode of new ones, are on disk, so that a rename can mark it as complete."""
    for path in folder.rglob("*"):
        _to_disk(path, None if path.is_dir() else folder.stat().st_mode & 0o666)
    _to_disk(folder)


def rename_folder(folder: Path, target: Path):
    """Rename a folder whose files are on disk; the new name is on disk when this returns."""
    folder.rename(target)
    _to_disk(target.parent)


def _to_disk(path: Path, mode: int | None = None):
    """Wait until a file, or the names in a folder, are on disk; change the mode if one is given.

    Some libraries make files that only their owner may read.
    """
    if mode is not None and stat.S_IMODE(path.stat().st_mode) != stat.S_IMODE(mode):
        path.chmod(stat.S_IMODE(mode))
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do not know it for folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Turn what libraries raise when a disk is full into an error that says which folder's.

    Raises:
        OSError: the disk of `folder` is full.
    """
    try:
        yield
    except Exception as error:
        cause = error
        while cause is not None:  # torch raises its own errors while it handles that of the disk
            if getattr(cause, "errno", None) in _FULL or re.search(_FULL_MESSAGES, str(cause)):
                full = f"the disk of {folder} is full; free some space and run it again"
                raise OSError(errno.ENOSPC, full) from error
            cause = cause.__cause__ or cause.__context__
        raise


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep other processes from writing a file or folder while the block runs; the lock ends with this process.

    Raises:
        ValueError: another process has it, or libraries cannot write a file of this name.
    """
    from filelock import FileLock, Timeout  # not at the top: most commands write nothing

    path = Path(path).resolve()
    if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
        raise ValueError(f"{path}: this name is not UTF-8, so safetensors cannot write there. Pass another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_file = path.with_name(f".{path.name}.lock")
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{path} is in use by another process. Wait until it ends, or pass another name.") from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            # Before the release, so that nobody locks it in between; filelock refuses a file that was opened before.
            lock_file.unlink()
        lock.release()


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
