"""What a run has finished, on disk: lines of JSON that are appended as the model answers, so that a stopped run continues."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from minigpt3d.files import parse_json


class Key(NamedTuple):
    """An object, and the state of its file.

    Args:
        file: path, or a hash of a URL, which may hold a password.
        node: number of the node in the scene, None for the whole file.
        size: bytes; None for URLs and missing files, which are read again.
        modified: nanoseconds.
    """

    file: str
    node: int | None
    size: int | None
    modified: int | None

    @classmethod
    def of(cls, source: str | os.PathLike, node: int | None = None) -> "Key":
        try:
            state = None if isinstance(source, str) else os.stat(source)
        except (OSError, ValueError):
            state = None
        file = hashlib.sha256(source.encode()).hexdigest() if isinstance(source, str) else os.fspath(source)
        return cls(file, node, *((None, None) if state is None else (state.st_size, state.st_mtime_ns)))


class Journal:
    """The file beside a catalog that is being written: a line of settings, then a line for each finished object.

    Rows stay on disk; memory holds their places only.

    Args:
        catalog: the file that is written in the end.
        settings: what the answers depend on.

    Raises:
        ValueError: it was begun with other settings, or is damaged.
    """

    def __init__(self, catalog: Path, settings: dict[str, Any]):
        self.path = catalog.with_name(f".{catalog.name}.unfinished")
        self._places: dict[Key, tuple[int, int]] = {}
        self._file = open(self.path, "a+b")  # what is written goes to the end, wherever was read before
        try:
            self._read(catalog, settings)
        except BaseException:
            self._file.close()
            raise

    def _read(self, catalog: Path, settings: dict[str, Any]):
        """Find what is finished, and remove the torn line that a stopped run may leave."""
        advice = f"Delete {self.path} to begin again."
        begun, place = {}, 0
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            where = f"{self.path}, line {number}"
            entry = parse_json(line, where, advice=advice)
            try:
                if number == 1:
                    begun = entry
                else:
                    self._places[Key(*entry["key"])] = (place, len(line))
            except (KeyError, TypeError) as error:
                raise ValueError(f"{where}: not a finished object. {advice}") from error
            place += len(line)
        if not self._places:
            self._file.truncate(0)
            self._file.write(_line(settings))
            self._file.flush()
            return
        self._file.truncate(place)
        for name, value in json.loads(_line(settings)).items():
            if begun.get(name) != value:
                raise ValueError(
                    f"{catalog}: a stopped run is to be continued, but its {name} was {begun.get(name)!r} and now is "
                    f"{value!r}. Repeat its command to finish it. {advice}"
                )

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error):
        self._file.close()
        if not self._places:
            self.path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def __getitem__(self, key: Key) -> dict[str, Any]:
        place, length = self._places[key]
        self._file.seek(place)
        return json.loads(self._file.read(length))["row"]

    def add(self, rows: Iterable[tuple[Key, dict[str, Any]]]):
        """Append rows; they are on disk when this returns."""
        for key, row in rows:
            line = _line({"key": key, "row": row})
            self._file.write(line)
            self._file.flush()
            self._places[key] = (self._file.tell() - len(line), len(line))
        os.fsync(self._file.fileno())

    def remove(self):
        """The catalog is complete."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"
