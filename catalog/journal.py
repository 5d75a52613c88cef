"""What a run has finished, on disk: lines of JSON that are appended as the model answers, so that a stopped run continues."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from minigpt3d.files import parse_json


class Key(NamedTuple):
    """An object, and the state of its file.

    Args:
        file: path or URL.
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
        file = source if isinstance(source, str) else os.fspath(source)
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
        if not self.path.exists():
            self.path.write_bytes(_line(settings))
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1  # a stopped run may leave a torn line
        if end < len(content):
            os.truncate(self.path, end)
        advice = f"Delete {self.path} to begin again."
        place = 0
        for number, line in enumerate(content[:end].splitlines(keepends=True)):
            entry = parse_json(line, f"{self.path}, line {number + 1}", advice=advice)
            if number == 0:
                for name, value in json.loads(_line(settings)).items():
                    if entry.get(name) != value:
                        raise ValueError(
                            f"{catalog}: a stopped run is to be continued, but its {name} was {entry.get(name)!r} and now "
                            f"is {value!r}. Repeat its command to finish it. {advice}"
                        )
            else:
                self._places[Key(*entry["key"])] = (place, len(line))
            place += len(line)
        if place == 0:
            self.path.write_bytes(_line(settings))
            place = self.path.stat().st_size
        self._file, self._end = open(self.path, "r+b"), place

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error):
        self._file.close()

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
            self._file.seek(self._end)
            self._file.write(line)
            self._places[key] = (self._end, len(line))
            self._end += len(line)
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self):
        """The catalog is complete."""
        self._file.close()
        self.path.unlink()


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"
