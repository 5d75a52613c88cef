"""Pack training data as Parquet shards: small, shuffled once, ready for `load_dataset(..., streaming=True)`.

    OUT/README.md                                  dataset card, so that the Hub and `datasets` find the sources
    OUT/packed.json                                the manifest: rows and digest of every shard, sizes, broken clouds
    OUT/{source}/train-00000-of-00042.parquet      rows of one source, in an order drawn by the seed

A row is one conversation and its cloud: `object_id`, `coord` (uint16, three a point, [-1, 1] in 65536 steps), `color`
(uint8, three a point, [0, 1] in 256 steps), `conversations` as in PointLLM's annotations, and if asked for `groups` (int16, the
indices that a model's encoder gathers, see `groups`) and `preview`. Clouds are normalized before they are packed, so that
training takes them as they are. Damage is noticed: every page of a shard has a checksum, and the manifest has a digest of
each shard's footer, which tells where the pages are and holds a digest of the rows.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minigpt3d.files import (
    folder_to_disk,
    locked,
    read_json,
    rename_folder,
    write_json,
    write_text,
    written_file,
)
from minigpt3d.messages import MultilineError, one_line

from .clouds import Grouping, decode_cloud, load_encoded, point_cloud_path, to_glb
from .reading import FileReader, FileResult, Limits
from .records import SOURCES, read_records, skipping, to_sample
from .sources import COLUMNS, GROUPS_COLUMN, MANIFEST_FILE, ROWS_PER_GROUP, footer_digest, shard_name
from .tables import read_table


NUM_POINTS = 8192
ROWS_PER_SHARD = 512
# A small data set still has a shard for each sample of a batch (see `training.stream`), but none of very few rows.
LEAST_SHARDS, LEAST_ROWS = 32, 8
PLAN_FILE = "plan.json"
# Columns of a shard with previews, as datasets and the Hub's viewer know them.
_TEXT, _BINARY = {"dtype": "string", "_type": "Value"}, {"dtype": "binary", "_type": "Value"}
PREVIEWED_FEATURES = {
    "object_id": _TEXT,
    "coord": _BINARY,
    "color": _BINARY,
    "conversations": {"feature": {"from": _TEXT, "value": _TEXT}, "_type": "List"},
    "preview": {"_type": "Mesh"},
}


# ---- Entries --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What becomes a row: an object, the file of its cloud, and PointLLM's `conversations`."""

    object_id: str
    path: str
    conversations: list[dict]


def release_entries(
    data: Path, annotations: list[Path], skip: Callable[[str], None] | None = None
) -> dict[str, list[Entry]]:
    """Entries by source of a release in PointLLM's layout.

    Args:
        skip: gets the message about each record out of schema; without it, the first one is raised.

    Raises:
        ValueError: as `read_records`; or there is no folder of clouds.
    """
    if not data.is_dir():
        raise ValueError(f"`data` {data} is no folder; it must hold the clouds {{object_id}}_8192.npy.")
    return sort_entries(
        (source, Entry(sample.object_id, str(point_cloud_path(data, sample.object_id)), record["conversations"]))
        for source, sample, record in read_records(annotations, skip)
    )


def table_entries(path: Path, skip: Callable[[str], None] | None = None) -> dict[str, list[Entry]]:
    """Entries by source of a table of files and captions or conversations.

    A `.csv` has the columns `file` and `caption`, and may have `object_id`. A line of JSON is `{"file": …, "caption": …}` or
    `{"file": …, "conversations": […]}`. Files are found relative to `path`. A caption answers "What is this?".
    Conversations are PointLLM's; without `conversation_type` they are single_round or multi_round by their length.
    `object_id` is the file's name if not given.

    Args:
        skip: gets the message about each line out of schema; without it, the first one is raised.

    Raises:
        ValueError: a line out of schema, with its number.
    """
    rows = []
    for where, row in read_table(path, {"file", "caption"}):
        with skipping(skip):
            if not (isinstance(row, dict) and isinstance(row.get("file"), str) and row["file"].strip()):
                raise ValueError(
                    f"{where}: expected 'file' and 'caption' or 'conversations', got {json.dumps(row)[:80]}"
                )
            record = to_record({"object_id": Path(row["file"]).stem} | row, where)
            source, sample = to_sample(record, where)
            rows.append((source, Entry(sample.object_id, str(path.parent / row["file"]), record["conversations"])))
    return sort_entries(rows)


def sort_entries(rows: Iterable[tuple[str, Entry]]) -> dict[str, list[Entry]]:
    """Entries by source, in the order of the rows; a source may have none."""
    entries: dict[str, list[Entry]] = {source: [] for source in SOURCES.values()}
    for source, entry in rows:
        entries[source].append(entry)
    return entries


def to_record(record: dict, where: str) -> dict:
    """A row with a caption or conversations in PointLLM's schema.

    Raises:
        ValueError: it has neither or both, or no text.
    """
    if ("caption" in record) == ("conversations" in record):
        raise ValueError(f"{where}: expected either a 'caption' or 'conversations', and no empty ones.")
    if "caption" in record:
        if not isinstance(record["caption"], str) or not record["caption"].strip():
            raise ValueError(f"{where}: 'caption' must be a text, got {record['caption']!r:.80}.")
        turns = [{"from": "human", "value": "<point>\nWhat is this?"}, {"from": "gpt", "value": record["caption"]}]
        return record | {"conversations": turns, "conversation_type": "simple_description"}
    turns = record["conversations"] if isinstance(record["conversations"], list) else []
    for turn in turns:
        if isinstance(turn, dict) and turn.get("from") == "gpt" and not str(turn.get("value", "")).strip():
            raise ValueError(f"{where}: an answer in 'conversations' is empty, got {turn!r:.80}.")
    return {"conversation_type": "multi_round" if len(turns) > 3 else "single_round"} | record


# ---- Pack -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    path: Path
    entries: list[Entry]


def pack(
    entries: dict[str, list[Entry]],
    output_dir: Path,
    seed: int = 0,
    rows_per_shard: int = ROWS_PER_SHARD,
    max_broken: float = 0.01,
    num_workers: int | None = None,
    reading: dict | None = None,
    limits: Limits | None = None,
    notify: Callable[[str], None] | None = None,
    preview: bool = False,
    skipped: Sequence[str] = (),
    grouping: Grouping | None = None,
) -> dict:
    """Write the data set; returns its manifest.

    An interrupted run is resumed: finished shards are kept in `OUT.partial`, which becomes `OUT` at the end.

    Args:
        entries: by source.
        output_dir: a new folder.
        seed: of the order.
        rows_per_shard: largest length of a shard.
        max_broken: share of rows whose texts or clouds may be missing or broken; they are skipped and listed.
        num_workers: processes; by default one for each core.
        reading: arguments of `load_point_cloud` for the files, such as `up_axis`.
        limits: of reading one file.
        notify: called with each warning about a file.
        preview: add a column of small `.glb` files, which the Hub's viewer shows.
        skipped: messages about rows that are no entries, which count as broken and are listed with them.
        grouping: add a column with the groups of each cloud.

    Raises:
        ValueError: the model of the grouping reads more points than are packed, there is nothing to pack, too many rows are
            broken, or `OUT.partial` is of another run.
        ImportError: pyarrow is not installed.
    """
    _pyarrow()
    output_dir, reading = output_dir.resolve(), reading or {}
    if grouping is not None and grouping.num_points > NUM_POINTS:
        raise ValueError(f"`groups`: the model reads {grouping.num_points} points, packed clouds have {NUM_POINTS}.")
    total = len(skipped) + sum(map(len, entries.values()))
    check_broken(skipped, total, max_broken)
    if not any(entries.values()):
        raise ValueError("there is nothing to pack: the annotations hold no conversations.")
    with locked(output_dir):
        if output_dir.exists():
            raise ValueError(f"{output_dir} exists already. Pass a new folder, or remove it.")
        partial = output_dir.with_name(output_dir.name + ".partial")
        shards = list(plan_shards(partial, entries, seed, rows_per_shard))
        groups = asdict(grouping) if grouping is not None else None
        settings = [seed, NUM_POINTS, reading, *(["preview"] if preview else []), *([groups] if groups else [])]
        plan = begin_plan(partial, shards, settings)
        facts = _write_shards(
            shards,
            plan,
            reading,
            lambda broken: check_broken([*skipped, *broken], total, max_broken),
            num_workers,
            limits,
            notify,
            preview,
            grouping,
        )
        manifest = _manifest(shards, facts, seed) | {"reading": reading, "preview": preview, "groups": groups}
        manifest["broken"] = [*skipped, *manifest["broken"]]
        _complete(partial, output_dir, manifest)
    return manifest


def _complete(partial: Path, output_dir: Path, manifest: dict):
    """Write manifest and card beside the shards, and give the folder its name."""
    write_json(partial / MANIFEST_FILE, manifest)
    write_text(partial / "README.md", dataset_card(manifest))
    for left_over in partial.rglob("*.tmp"):  # of a killed run
        left_over.unlink()
    folder_to_disk(partial)
    rename_folder(partial, output_dir)
    (output_dir / PLAN_FILE).unlink()


def plan_shards(folder: Path, entries: dict[str, list[Entry]], seed: int, rows_per_shard: int) -> Iterator[Shard]:
    """Shuffle each source once and cut it into shards of equal length, give or take a row."""
    for source, rows in entries.items():
        if not rows:
            continue
        order = np.random.default_rng([seed, *source.encode()]).permutation(len(rows))
        count = max(-(-len(rows) // rows_per_shard), min(LEAST_SHARDS, len(rows) // LEAST_ROWS), 1)
        for index, part in enumerate(np.array_split(order, count)):
            yield Shard(folder / shard_name(source, index, count), [rows[i] for i in part])


@dataclass(frozen=True)
class Plan:
    """plan.json in the temporary folder: what is packed there, and the facts of the shards that are finished."""

    path: Path
    sha256: str
    finished: dict[str, dict]

    def add(self, shard: Shard, facts: dict):
        """Record a finished shard."""
        self.finished[f"{shard.path.parent.name}/{shard.path.name}"] = facts
        write_json(self.path, {"sha256": self.sha256, "shards": self.finished}, indent=None)

    def facts_of(self, shard: Shard) -> dict | None:
        """The facts of a finished shard, after its file has been read through; None if it is to be written (again)."""
        facts = self.finished.get(f"{shard.path.parent.name}/{shard.path.name}")
        try:
            if facts is None or facts["footer"] != check_shard(shard.path):
                return None
        except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
            return None
        return facts


def begin_plan(partial: Path, shards: list[Shard], settings: list) -> Plan:
    """Write down what is packed in the temporary folder, or compare it with what an interrupted run wrote there.

    Raises:
        ValueError: the temporary folder holds shards of another plan, or its plan is damaged.
    """
    digest = hashlib.sha256(json.dumps(settings).encode())
    for shard in shards:
        digest.update(shard.path.name.encode())
        for entry in shard.entries:
            digest.update(json.dumps([entry.object_id, entry.path, entry.conversations]).encode())
    path, finished = partial / PLAN_FILE, {}
    if path.exists():
        content = read_json(path, advice=f"Remove {partial} to begin anew.")
        if content.get("sha256") != digest.hexdigest():
            raise ValueError(f"{partial} was begun with other data or settings. Finish it with those, or remove it.")
        finished = content.get("shards", {})
    partial.mkdir(parents=True, exist_ok=True)
    plan = Plan(path, digest.hexdigest(), finished if isinstance(finished, dict) else {})
    write_json(path, {"sha256": plan.sha256, "shards": plan.finished}, indent=None)
    return plan


def _write_shards(
    shards: list[Shard],
    plan: Plan,
    reading: dict,
    check: Callable[[list[str]], None],
    num_workers: int | None,
    limits: Limits | None,
    notify: Callable[[str], None] | None,
    preview: bool,
    grouping: Grouping | None,
) -> dict[Path, dict]:
    """Write the shards that are not there yet; returns the facts of all of them.

    Args:
        check: raises if too many are broken; gets the messages so far.
    """
    total = sum(len(shard.entries) for shard in shards)
    facts = {shard.path: of_shard for shard in shards if (of_shard := plan.facts_of(shard)) is not None}
    waiting = [shard for shard in shards if shard.path not in facts]
    paths = [entry.path for shard in waiting for entry in shard.entries]
    num_processes = max(1, min(num_workers or os.cpu_count() or 1, len(paths)))
    load, arguments = load_encoded, {"num_points": NUM_POINTS} | reading
    if grouping is not None:
        from .groups import load_grouped  # imports torch

        load, arguments = load_grouped, arguments | {"grouping": grouping}
    with (
        tqdm(total=total, desc="packing", unit="object", disable=None) as progress,
        FileReader(load, num_processes, limits) as reader,
    ):
        progress.update(total - len(paths))
        results = reader.read_files(paths, **arguments)
        for shard in waiting:
            of_shard = islice(results, len(shard.entries))
            facts[shard.path] = write_shard(shard, of_shard, notify, preview, grouping)
            plan.add(shard, facts[shard.path])
            progress.update(len(shard.entries))
            check([line for of_shard in facts.values() for line in of_shard["broken"]])
    return facts


def check_broken(broken: Sequence[str], total: int, max_broken: float):
    """
    Raises:
        MultilineError: of `total` rows, more than a share of `max_broken` are broken.
    """
    if len(broken) > max_broken * total:
        listed = "\n  ".join(broken[:5])
        raise MultilineError(
            f"{len(broken)} of {total} texts or clouds are missing or broken, more than `max_broken` {max_broken:g}:\n  "
            f"{listed}\nIf that is expected, raise `max_broken`; what is packed so far is kept."
        )


def write_shard(
    shard: Shard,
    results: Iterable[FileResult],
    notify: Callable[[str], None] | None = None,
    preview: bool = False,
    grouping: Grouping | None = None,
) -> dict:
    """Write the rows of one shard; returns its facts: rows, broken clouds, largest error, digest of the footer.

    Args:
        results: of `load_encoded`, or with a grouping of `load_grouped`, one for each entry.
        notify: called with each warning about a file.
        preview, grouping: see `pack`.
    """
    pa, pq = _pyarrow()
    names = COLUMNS if grouping is None else (*COLUMNS, GROUPS_COLUMN)
    columns: dict[str, list] = {name: [] for name in names}
    broken, max_error = [], 0.0
    for entry, result in zip(shard.entries, results, strict=True):
        for text in result.warnings if notify else ():
            notify(text)
        if result.error is not None:  # one file must not end the run
            broken.append(f"object_id {entry.object_id!r}: {one_line(result.error)[:200]}")
            continue
        coord, color, error, *groups = result.content
        max_error = max(max_error, error)
        for name, value in zip(names, (entry.object_id, coord, color, entry.conversations, *groups), strict=True):
            columns[name].append(value)
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    fields = [
        ("object_id", pa.string()), ("coord", pa.binary()), ("color", pa.binary()), ("conversations", pa.list_(turn))
    ]  # fmt: skip
    metadata = {}
    if grouping is not None:
        fields.append((GROUPS_COLUMN, pa.binary()))
    if preview:
        fields.append(("preview", pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
        columns["preview"] = [
            {"bytes": to_glb(decode_cloud(coord, color)), "path": f"{object_id}.glb"}
            for object_id, coord, color in zip(*(columns[name] for name in COLUMNS[:3]), strict=True)
        ]
        features = PREVIEWED_FEATURES if grouping is None else {GROUPS_COLUMN: _BINARY} | PREVIEWED_FEATURES
        metadata["huggingface"] = json.dumps({"info": {"features": features}})
    metadata["minigpt3d"] = json.dumps({"sha256": _digest(columns)})
    table = pa.table(columns, schema=pa.schema(fields)).replace_schema_metadata(metadata)
    settings = {"row_group_size": ROWS_PER_GROUP, "compression": "lz4", "use_dictionary": False}
    shard.path.parent.mkdir(parents=True, exist_ok=True)
    with written_file(shard.path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True, **settings)
        with open(temporary, "rb") as file:
            footer = footer_digest(file)
    return {"rows": table.num_rows, "broken": broken, "max_coord_error": max_error, "footer": footer}


def _digest(columns: dict[str, list]) -> str:
    """Of the rows, so that the footers of two shards differ if their rows do."""
    digest = hashlib.sha256()
    for object_id, coord, color, conversations in zip(*(columns[name] for name in COLUMNS), strict=True):
        digest.update(json.dumps([object_id, conversations]).encode() + coord + color)
    digest.update(b"".join(columns.get(GROUPS_COLUMN, ())))
    return digest.hexdigest()


def check_shard(path: Path) -> str:
    """Read a shard through, which verifies its pages; returns the digest of its footer.

    Raises:
        OSError, ValueError: it is missing or damaged.
    """
    _, pq = _pyarrow()
    with open(path, "rb") as file:
        footer = footer_digest(file)
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            for number in range(parquet.num_row_groups):
                parquet.read_row_group(number, use_threads=False)
    return footer


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "Packed data needs pyarrow, which comes with datasets: pip install 'minigpt3d[train]'"
        ) from error
    return pyarrow, pyarrow.parquet


def _manifest(shards: list[Shard], facts: dict[Path, dict], seed: int) -> dict:
    sources: dict[str, list[int]] = {}
    footers: dict[str, list[str]] = {}
    for shard in shards:
        sources.setdefault(shard.path.parent.name, []).append(facts[shard.path]["rows"])
        footers.setdefault(shard.path.parent.name, []).append(facts[shard.path]["footer"])
    rows = sum(map(sum, sources.values()))
    size = sum(shard.path.stat().st_size for shard in shards)
    return {
        "num_points": NUM_POINTS,
        "seed": seed,
        "rows": rows,
        "bytes_per_row": round(size / max(rows, 1)),
        "max_coord_error": max(of_shard["max_coord_error"] for of_shard in facts.values()),
        "broken": [line for shard in shards for line in facts[shard.path]["broken"]],
        "shards": sources,
        "footers": footers,
    }


def dataset_card(manifest: dict) -> str:
    """README.md of the data set."""
    configs = "".join(
        f"- config_name: {source}\n  data_files:\n  - split: train\n    path: {source}/train-*.parquet\n"
        for source in manifest["shards"]
    )
    counts = ", ".join(f"{source} {sum(rows):,}" for source, rows in manifest["shards"].items())
    groups = manifest["groups"]
    return (
        f"---\nconfigs:\n{configs}tags: [point-cloud, 3d, minigpt3d]\n---\n\n# Conversations about point clouds\n\n"
        f"{manifest['rows']:,} rows ({counts}), {manifest['bytes_per_row']:,} bytes each, packed by `minigpt3d pack`.\n"
        f"A row: `object_id`; `coord`, {manifest['num_points']} × 3 uint16, value / 32767.5 - 1, off by at most "
        f"{manifest['max_coord_error']:.1e}; `color`, {manifest['num_points']} × 3 uint8; `conversations`"
        f"{f'; `groups`, {Grouping(**groups)}, int16: of each its center and its neighbors' if groups else ''}"
        f"{'; `preview`, a .glb of some points' if manifest['preview'] else ''}.\n"
    )


def push(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload a packed data set; returns its address.

    Raises:
        ValueError: the folder holds no packed data, or the upload failed; the data stay on disk.
    """
    if not (folder / MANIFEST_FILE).is_file():
        raise ValueError(f"{folder}: no packed data there ({MANIFEST_FILE} is missing).")
    from huggingface_hub import HfApi

    api, target = HfApi(), {"repo_id": repo_id, "repo_type": "dataset"}
    try:
        api.create_repo(**target, private=private, exist_ok=True)
        return str(api.upload_folder(**target, folder_path=folder, commit_message="minigpt3d pack"))
    except Exception as error:  # the network can fail in many ways
        retry = f"hf upload {repo_id} {folder} --repo-type dataset"
        raise ValueError(
            f"{folder} was not uploaded: {one_line(error)} (it is on disk; try again: {retry})"
        ) from error
