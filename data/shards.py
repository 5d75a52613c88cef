"""Training data as Parquet shards: small, shuffled once, ready for `load_dataset(..., streaming=True)`. `minigpt3d pack`.

    OUT/README.md                                  dataset card, so that the Hub and `datasets` find the sources
    OUT/packed.json                                what is in it: rows of every shard, sizes, what was broken
    OUT/{source}/train-00000-of-00042.parquet      rows of one source, in an order drawn by the seed

A row is one conversation and its cloud: `object_id`, `coord` (uint16, three a point, [-1, 1] in 65536 steps), `color`
(uint8, three a point, [0, 1] in 256 steps) and `conversations` as in PointLLM's annotations. Clouds are normalised
before they are packed, as the model's processor does anyway.
"""

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minigpt3d.point_cloud_minigpt3d import load_point_cloud

from .clouds import decode_cloud, encode_cloud, point_cloud_path
from .records import CORRUPT_OBJECT_IDS, SOURCES, Entry, read_records
from .sources import MANIFEST_FILE, ROWS_PER_GROUP


NUM_POINTS = 8192
ROWS_PER_SHARD = 512
# A data set of a few hundred objects still has a shard for each sample of a batch (see `stream`), but none of few rows.
LEAST_SHARDS, LEAST_ROWS = 32, 8
PLAN_FILE = "plan.json"


# ---- What is packed -------------------------------------------------------------------------------------------------


def release_entries(data_dir: Path, annotations: list[Path]) -> dict[str, list[Entry]]:
    """Entries by source of a release in PointLLM's layout; the two known corrupt objects are left out.

    Raises:
        ValueError: as `read_records`; or there is no folder of clouds.
    """
    if not data_dir.is_dir():
        raise ValueError(f"--data {data_dir} is no folder; it must hold the clouds {{object_id}}_8192.npy.")
    entries: dict[str, list[Entry]] = {source: [] for source in SOURCES.values()}
    for source, sample, record in read_records(annotations):
        if sample.object_id not in CORRUPT_OBJECT_IDS:
            path = str(point_cloud_path(data_dir, sample.object_id))
            entries[source].append(Entry(sample.object_id, path, record["conversations"]))
    return entries


# ---- Packing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    path: Path
    entries: list[Entry]


def plan_shards(folder: Path, entries: dict[str, list[Entry]], seed: int, rows_per_shard: int) -> Iterator[Shard]:
    """Shuffle each source once and cut it into shards of equal length, give or take a row."""
    for source, rows in entries.items():
        if not rows:
            continue
        order = np.random.default_rng([seed, *source.encode()]).permutation(len(rows))
        count = max(-(-len(rows) // rows_per_shard), min(LEAST_SHARDS, len(rows) // LEAST_ROWS), 1)
        for index, part in enumerate(np.array_split(order, count)):
            path = folder / source / f"train-{index:05d}-of-{count:05d}.parquet"
            yield Shard(path, [rows[i] for i in part])


def pack(
    entries: dict[str, list[Entry]],
    output_dir: Path,
    seed: int = 0,
    rows_per_shard: int = ROWS_PER_SHARD,
    max_broken: float = 0.01,
    num_workers: int | None = None,
    reading: dict | None = None,
) -> dict:
    """Write the data set; returns its manifest.

    A run that was stopped goes on: finished shards in `OUT.partial` are kept. `OUT` appears when all is done.

    Args:
        entries: by source.
        output_dir: a new folder.
        seed: of the order.
        rows_per_shard: largest length of a shard.
        max_broken: share of rows whose clouds may be missing or unreadable; they are skipped and listed.
        num_workers: processes; by default one for each core.
        reading: `up_axis` and `missing_color` of the files, see `load_point_cloud`.

    Raises:
        ValueError: there is nothing to pack, too much is broken, or `OUT.partial` is of another run.
        ImportError: pyarrow is not installed.
    """
    _pyarrow()
    output_dir = output_dir.resolve()
    total = sum(map(len, entries.values()))
    if not total:
        raise ValueError("there is nothing to pack: the annotations hold no conversations.")
    if output_dir.exists():
        raise ValueError(f"{output_dir} exists already. Pass a new folder, or remove it.")
    partial = output_dir.with_name(output_dir.name + ".partial")
    shards = list(plan_shards(partial, entries, seed, rows_per_shard))
    write = functools.partial(write_shard, reading=reading or {})
    _check_plan(partial, shards, [seed, NUM_POINTS, reading or {}])
    reports = {}
    waiting = []
    for shard in shards:
        shard.path.parent.mkdir(parents=True, exist_ok=True)
        if shard.path.exists():
            reports[shard.path] = read_report(shard.path)
        else:
            waiting.append(shard)
    with (
        tqdm(total=total, desc="packing", unit="object", disable=None) as progress,
        ProcessPoolExecutor(num_workers or os.cpu_count()) as pool,
    ):
        progress.update(sum(len(s.entries) for s in shards) - sum(len(s.entries) for s in waiting))
        for shard, report in zip(waiting, pool.map(write, waiting), strict=True):
            reports[shard.path] = report
            progress.update(len(shard.entries))
            broken = [line for each in reports.values() for line in each["broken"]]
            if len(broken) > max_broken * total:
                pool.shutdown(cancel_futures=True)
                listed = "\n  ".join(broken[:5])
                raise ValueError(
                    f"{len(broken)} of {total} clouds are missing or broken, more than --max-broken {max_broken:g}:\n  "
                    f"{listed}\nIf that is to be expected, raise --max-broken; what is packed so far is kept."
                )
    manifest = _manifest(shards, reports, seed) | {"reading": reading or {}}
    (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(dataset_card(manifest), encoding="utf-8")
    (partial / PLAN_FILE).unlink()
    partial.rename(output_dir)
    return manifest


def _check_plan(partial: Path, shards: list[Shard], settings: list):
    """
    Raises:
        ValueError: shards of another plan lie in the temporary folder.
    """
    digest = hashlib.sha256(json.dumps(settings).encode())
    for shard in shards:
        digest.update(shard.path.name.encode())
        for entry in shard.entries:
            digest.update(json.dumps([entry.object_id, entry.path, entry.conversations]).encode())
    plan = {"sha256": digest.hexdigest()}
    path = partial / PLAN_FILE
    if path.exists() and json.loads(path.read_text()) != plan:
        raise ValueError(f"{partial} was begun with other data or settings. Finish it with those, or remove it.")
    partial.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan))


def write_shard(shard: Shard, reading: dict) -> dict:
    """Read, pack and write the rows of one shard; returns its report, which the file holds too."""
    pa, pq = _pyarrow()
    columns: dict[str, list] = {"object_id": [], "coord": [], "color": [], "conversations": []}
    broken, error = [], 0.0
    for entry in shard.entries:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cloud = load_point_cloud(entry.path, NUM_POINTS, **reading)
        except Exception as problem:  # whatever a reader stumbles over in one file must not end the run
            broken.append(f"object_id {entry.object_id!r}: {' '.join(str(problem).split())[:200]}")
            continue
        coord, color = encode_cloud(cloud)
        error = max(error, float(np.abs(decode_cloud(coord, color)[:, :3] - cloud[:, :3]).max()))
        for name, value in zip(columns, (entry.object_id, coord, color, entry.conversations), strict=True):
            columns[name].append(value)
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    schema = pa.schema(
        [("object_id", pa.string()), ("coord", pa.binary()), ("color", pa.binary()), ("conversations", pa.list_(turn))]
    )
    report = {"rows": len(columns["object_id"]), "broken": broken, "max_coord_error": error}
    table = pa.table(columns, schema=schema).replace_schema_metadata({"minigpt3d": json.dumps(report)})
    temporary = shard.path.with_name(shard.path.name + ".tmp")
    pq.write_table(table, temporary, row_group_size=ROWS_PER_GROUP, compression="lz4", use_dictionary=False)
    temporary.rename(shard.path)
    return report


def read_report(path: Path) -> dict:
    """What `write_shard` noted in a shard.

    Raises:
        ValueError: the file is no such shard.
    """
    _, pq = _pyarrow()
    try:
        return json.loads(pq.read_schema(path).metadata[b"minigpt3d"])
    except Exception as error:
        raise ValueError(
            f"{path}: not a shard of `minigpt3d pack`, or damaged ({error}). Remove it and go on."
        ) from error


def _manifest(shards: list[Shard], reports: dict[Path, dict], seed: int) -> dict:
    sources: dict[str, list[int]] = {}
    for shard in shards:
        sources.setdefault(shard.path.parent.name, []).append(reports[shard.path]["rows"])
    rows = sum(map(sum, sources.values()))
    size = sum(shard.path.stat().st_size for shard in shards)
    return {
        "num_points": NUM_POINTS,
        "seed": seed,
        "rows": rows,
        "bytes_per_row": round(size / max(rows, 1)),
        "max_coord_error": max(report["max_coord_error"] for report in reports.values()),
        "broken": [line for shard in shards for line in reports[shard.path]["broken"]],
        "shards": sources,
    }


def dataset_card(manifest: dict) -> str:
    configs = "".join(
        f"- config_name: {source}\n  data_files:\n  - split: train\n    path: {source}/train-*.parquet\n"
        for source in manifest["shards"]
    )
    counts = ", ".join(f"{source} {sum(rows):,}" for source, rows in manifest["shards"].items())
    return (
        f"---\nconfigs:\n{configs}tags: [point-cloud, 3d, minigpt3d]\n---\n\n# Conversations about point clouds\n\n"
        f"{manifest['rows']:,} rows ({counts}), {manifest['bytes_per_row']:,} bytes each, packed by `minigpt3d pack`.\n"
        f"A row: `object_id`; `coord`, {manifest['num_points']} × 3 uint16, value / 32767.5 - 1, off by at most "
        f"{manifest['max_coord_error']:.1e}; `color`, {manifest['num_points']} × 3 uint8; `conversations`.\n"
    )


def push(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload a packed data set; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    return str(
        api.upload_folder(repo_id=repo_id, folder_path=folder, repo_type="dataset", commit_message="minigpt3d pack")
    )


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "Packed data needs pyarrow, which comes with datasets: pip install 'minigpt3d[train]'"
        ) from error
    return pyarrow, pyarrow.parquet
