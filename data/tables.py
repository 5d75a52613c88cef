"""Tables of a user's own objects: `.csv`, or lines of JSON."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from .records import SOURCES, Entry, to_sample


def own_entries(path: Path) -> dict[str, list[Entry]]:
    """Entries by source of one's own objects, in a table or in lines of JSON.

    A `.csv` has the columns `file` and `caption`, and may have `object_id`. A line of JSON is `{"file": …, "caption": …}` or
    `{"file": …, "conversations": […]}`. Files are found relative to `path`. A caption answers "What is this?".
    Conversations are PointLLM's; without `conversation_type` they are single_round or multi_round by their length.
    `object_id` is the file's name if not given.

    Raises:
        ValueError: a line out of schema, with its number.
    """
    entries: dict[str, list[Entry]] = {source: [] for source in SOURCES.values()}
    for where, record in read_own_lines(path, {"file", "caption"}):
        if not isinstance(record, dict) or not isinstance(record.get("file"), str):
            raise ValueError(
                f"{where}: expected 'file' and 'caption' or 'conversations', got {json.dumps(record)[:80]}"
            )
        record = _own_record(record, where)
        source, sample = to_sample(record, where)
        file = path.parent / record["file"]
        entries[source].append(Entry(sample.object_id, str(file), record["conversations"]))
    return entries


LINES_SUFFIXES, OTHER_TABLES = (".csv", ".jsonl", ".json"), (".tsv", ".txt", ".xls", ".xlsx", ".ods", ".parquet")


def read_own_lines(path: Path, columns: set[str]) -> Iterator[tuple[str, dict]]:
    """Records of a `.csv` with at least these columns, or of lines of JSON, each with where it stands.

    Raises:
        ValueError: the file cannot be read, or is another table, or no lines of JSON.
    """
    suffix = path.suffix.lower()
    if suffix in OTHER_TABLES:
        raise ValueError(
            f"{path}: a {suffix} is not read. Save it as .csv, with commas and in UTF-8, or as lines of JSON."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin theirs with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}). Save it as UTF-8.") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}).") from error
    if suffix == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""))
        names = rows.fieldnames = [name.strip() for name in rows.fieldnames or ["nothing"]]
        if not columns <= set(names):
            wanted = " and ".join(sorted(columns, reverse=True))
            raise ValueError(
                f"{path}: its first line must name the column{'s' * (len(columns) > 1)} {wanted}, with commas between them; got {','.join(names)}."
            )
        if doubled := sorted({name for name in names if name and names.count(name) > 1}):
            raise ValueError(
                f"{path}: its first line names the column {doubled[0]!r} more than once. Keep one of them."
            )
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if None in row:
                raise ValueError(
                    f"{where}: more values than the first line has columns. Quote what holds a comma: "
                    'chair.glb,"A red, round chair."'
                )
            yield where, {name: value for name, value in row.items() if value}
        return
    for number, line in enumerate(text.split("\n"), start=1):  # of line breaks a text may hold others as they are
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error


def _own_record(record: dict, where: str) -> dict:
    """A line of the user's in PointLLM's schema."""
    record = {"object_id": Path(record["file"]).stem} | record
    if ("caption" in record) == ("conversations" in record):
        raise ValueError(f"{where}: expected either a 'caption' or 'conversations', and no empty ones.")
    if "caption" in record:
        if not isinstance(record["caption"], str) or not record["caption"].strip():
            raise ValueError(f"{where}: 'caption' must be a text, got {record['caption']!r:.80}.")
        turns = [{"from": "human", "value": "<point>\nWhat is this?"}, {"from": "gpt", "value": record["caption"]}]
        return record | {"conversations": turns, "conversation_type": "simple_description"}
    rounds = len(record["conversations"]) // 2 if isinstance(record["conversations"], list) else 0
    return {"conversation_type": "multi_round" if rounds > 1 else "single_round"} | record
