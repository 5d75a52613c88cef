"""Write a catalog: .csv, .jsonl, .parquet or .html, whole or not at all."""

import csv
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minigpt3d.files import check_new_file, written_file

from .gallery import write_gallery
from .rows import json_line, safe_cell, to_cells


Rows = Iterable[dict[str, Any]]
_ROWS_AT_ONCE = 1000  # of a Parquet file


def check_out(path: Path, sources: list[Path | str]):
    """
    Args:
        sources: what is read.

    Raises:
        ValueError: the file's suffix is unknown, or it cannot be written.
        ImportError: pyarrow is needed and missing.
    """
    if path.suffix.lower() not in WRITERS:
        raise ValueError(
            f"`out` {path}: expected a name that ends in {', '.join(WRITERS)}, for the form of the catalog."
        )
    check_new_file("out", path, sources)
    if path.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
        raise ImportError("A .parquet needs pyarrow, which comes with datasets: pip install 'minigpt3d[train]'")


def write_catalog(path: Path, rows: Rows, columns: dict[str, type], title: str):
    """Write rows in the form that the suffix names.

    Args:
        columns: of tables, in their order.
        title: of the page.
    """
    with written_file(path) as temporary:
        WRITERS[path.suffix.lower()](temporary, rows, columns, title)


def _write_csv(path: Path, rows: Rows, columns: dict[str, type], title: str):
    with open(path, "w", encoding="utf-8", newline="") as file:
        # Texts are quoted, so that a ";" in them ends no cell where it separates cells.
        table = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
        table.writerow(map(safe_cell, columns))
        table.writerows([safe_cell(cell) for cell in to_cells(row, list(columns))] for row in rows)


def _write_lines(path: Path, rows: Rows, columns: dict[str, type], title: str):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json_line(row) + "\n" for row in rows)


def _write_parquet(path: Path, rows: Rows, columns: dict[str, type], title: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {str: pa.string(), float: pa.float64(), int: pa.int64(), bool: pa.bool_()}
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    with pq.ParquetWriter(path, schema) as writer:
        for part in _parts(rows, _ROWS_AT_ONCE):
            cells = zip(*(to_cells(row, schema.names) for row in part), strict=True)
            arrays = [pa.array(values, type) for values, type in zip(cells, schema.types, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema))


def _parts(rows: Rows, size: int) -> Iterator[list[dict]]:
    part = []
    for row in rows:
        part.append(row)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


WRITERS: dict[str, Callable] = {
    ".csv": _write_csv,
    ".jsonl": _write_lines,
    ".parquet": _write_parquet,
    ".html": write_gallery,
}
