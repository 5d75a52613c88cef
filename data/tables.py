"""Tables that people write about their objects: `.csv` files, or JSON lines; for packing and for evaluation."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from minigpt3d.files import parse_json


TABLE_SUFFIXES = (".csv", ".jsonl", ".json")
UNREADABLE_SUFFIXES = (".tsv", ".txt", ".xls", ".xlsx", ".ods", ".parquet")  # other tables, which people may try


def read_table(path: Path, columns: set[str]) -> Iterator[tuple[str, dict]]:
    """The rows of a `.csv` or of JSON lines, each with its place in the file for messages.

    Args:
        columns: what the first line of a `.csv` must name; empty values are left out of its rows.

    Raises:
        ValueError: the file cannot be read, is a table of another format, or has a malformed line.
    """
    suffix = path.suffix.lower()
    expected = (
        f"Expected a table with {' and '.join(sorted(columns, reverse=True))}: a .csv in UTF-8, or lines of JSON."
    )
    if not path.is_file():
        raise ValueError(f"{path}: {'this is a folder' if path.is_dir() else 'there is no such file'}. {expected}")
    if suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{path}: {suffix or 'a file without extension'} is not read as a table. {expected}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}). Save it as UTF-8.") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}).") from error
    rows = list(_read_csv(path, text, columns) if suffix == ".csv" else _read_json_lines(path, text))
    if not rows:
        raise ValueError(f"{path}: it has no rows{' below its header' if suffix == '.csv' else ''}. {expected}")
    yield from rows


def _read_csv(path: Path, text: str, columns: set[str]) -> Iterator[tuple[str, dict]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    names = rows.fieldnames = [name.strip() for name in rows.fieldnames or ["nothing"]]
    if not columns <= set(names):
        expected = " and ".join(sorted(columns, reverse=True))
        raise ValueError(
            f"{path}: its first line must name the column{'s' * (len(columns) > 1)} {expected}, with commas between them; got {','.join(names)}."
        )
    if repeated := sorted({name for name in names if name and names.count(name) > 1}):
        raise ValueError(f"{path}: its first line names the column {repeated[0]!r} more than once. Keep one of them.")
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        if None in row:
            raise ValueError(
                f"{where}: more values than the first line has columns. Put a value with a comma in quotes: "
                'chair.glb,"A red, round chair."'
            )
        yield where, {name: value for name, value in row.items() if value}


def _read_json_lines(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a text may hold other line breaks
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where, object, advice="Each line is a JSON object.")
