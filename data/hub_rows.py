"""Objects of a data set on the Hub: its files are downloaded, and its rows become entries to pack."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from minigpt3d.files import write_bytes, written_file
from minigpt3d.messages import one_line

from .records import skipping, to_sample
from .shards import Entry, sort_entries, to_record


ADDRESS = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<config>[\w.-]+))?/?")


def hub_entries(
    address: str,
    mesh_column: str,
    text_column: str,
    split: str,
    folder: Path,
    skip: Callable[[str], None] | None = None,
) -> dict[str, list[Entry]]:
    """Entries by source of a data set on the Hub.

    Args:
        address: `hf://datasets/OWNER/NAME`, with `@REVISION` and `/CONFIGURATION` if it has several.
        mesh_column: files (`Mesh`, bytes, or paths and URLs) or arrays of points.
        text_column: a caption, or conversations in PointLLM's format.
        split: "train", for example.
        folder: where the files are kept; those of an earlier run are not downloaded again.
        skip: gets the message about each row that is empty or out of schema; without it, the first one is raised.

    Raises:
        ValueError: there is no such data set or column, or a row is out of schema.
        ImportError: datasets is not installed.
    """
    rows = []
    for index, row in enumerate(_stream(address, mesh_column, text_column, split)):
        where, text = f"{address}, row {index}", row[text_column]
        record = {"object_id": f"{index:07d}", "conversations" if isinstance(text, list) else "caption": text}
        sample = None
        with skipping(skip):
            record = to_record(record, where)
            if row[mesh_column] is None:
                raise ValueError(f"{where}: column {mesh_column!r} is empty.")
            source, sample = to_sample(record, where)
        if sample is not None:  # a download that fails ends the run: the next one continues
            folder.mkdir(parents=True, exist_ok=True)
            path = _keep(row[mesh_column], folder / f"{index:07d}", where)
            rows.append((source, Entry(sample.object_id, path, record["conversations"])))
    return sort_entries(rows)


def _stream(address: str, mesh_column: str, text_column: str, split: str) -> Iterator[dict]:
    try:
        from datasets import Mesh, load_dataset
    except ImportError as error:
        raise ImportError("Data sets on the Hub need datasets 5 or later: pip install -U datasets") from error
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(f"{address}: expected hf://datasets/OWNER/NAME.")
    try:
        rows = load_dataset(match["repo"], match["config"], revision=match["revision"], split=split, streaming=True)
    except Exception as error:  # of the Hub, of the network, or of the data set
        raise ValueError(f"{address}: the data set cannot be opened ({one_line(error)[:300]}).") from error
    columns = rows.column_names or list(next(iter(rows)))
    for option, column in (("mesh_column", mesh_column), ("text_column", text_column)):
        if column not in columns:
            raise ValueError(f"{address}: no column {column!r}; pass as `{option}` one of {', '.join(columns)}.")
    rows = rows.select_columns([mesh_column, text_column])
    if isinstance((rows.features or {}).get(mesh_column), Mesh):
        rows = rows.cast_column(mesh_column, Mesh(decode=False))
    yield from rows


def _keep(value: Any, stem: Path, where: str) -> str:
    """Keep the content of a cell in a file, if it is not there yet; returns its path."""
    content, name = None, value
    if isinstance(value, dict):
        content, name = value.get("bytes"), value.get("path")
    elif isinstance(value, bytes):
        content, name = value, ""
    elif isinstance(value, (list, np.ndarray)):
        path = stem.with_suffix(".npy")
        with written_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, np.array(value, dtype=np.float32))
        return str(path)
    if content is None and not isinstance(name, str):
        raise ValueError(f"{where}: expected a mesh file or an array of points, got {type(value).__name__}.")
    path = stem.with_name(stem.name + "".join(PurePosixPath(name or "").suffixes[-2:]))
    if not path.is_file():
        write_bytes(path, _download(name, where) if content is None else content)
    return str(path)


def _download(name: str, where: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(name, "rb") as file:
            return file.read()
    except Exception as error:  # each file system has its own
        raise ValueError(f"{where}: {name} cannot be read ({one_line(error)[:200]}).") from error
