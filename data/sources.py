"""Sources of training samples: rows of conversations with their clouds.

`open_sources` opens the sources of a stage's mixture. A `FolderSource` reads `.npy` files and annotations of the PointLLM
release, a `PackedSource` reads the Parquet shards that `shards` writes. `training.stream` chooses the rows of each step.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from minigpt3d.files import parse_json
from minigpt3d.hub import is_hub_id
from minigpt3d.messages import one_line

from .clouds import Grouping, decode_cloud, point_cloud_path, read_point_cloud
from .records import SOURCES, Sample, read_annotations, to_sample


# Of packed data (see `shards`).
ROWS_PER_GROUP = 64
MANIFEST_FILE = "packed.json"
COLUMNS = ("object_id", "coord", "color", "conversations")
GROUPS_COLUMN = "groups"  # if they are packed with groups


def open_sources(names: Iterable[str], data: str, annotations: list[Path], any_source: bool = False) -> dict:
    """The sources of a mixture by name.

    Args:
        names: of the sources, such as "brief".
        data: folder of `.npy` files if there are annotations; otherwise a packed data set, a folder or Hub id.
        annotations: JSON lists of PointLLM's; empty for packed data.
        any_source: leave out sources that have no samples, as long as one has.

    Raises:
        ValueError: a source has no samples, clouds are missing, or records are out of schema.
    """
    names = list(names)
    if annotations:
        samples = read_annotations(annotations)
    else:
        manifest = read_manifest(data)
        samples = manifest["shards"]
    present = [name for name in names if any(samples.get(name, ()))]
    absent = [name for name in names if name not in present]
    if absent and not (any_source and present):
        remedy = "Give `annotations` a file with" if annotations else "Pack annotations with"
        raise ValueError(
            f"The stage trains on {absent[0]!r} conversations, but there are none. {remedy} conversation_type "
            f"{_conversation_type(absent[0])!r}{'' if annotations else ' too'}."
        )
    if annotations:
        return {name: FolderSource(samples[name], data) for name in present}
    return {name: PackedSource(data, manifest, name) for name in present}


def use_groups(sources: dict, grouping: Grouping) -> Grouping | None:
    """Read the groups that are packed, if they are those of the model that trains.

    Args:
        sources: of `open_sources`.
        grouping: of the model.

    Returns:
        Another grouping, which is packed and cannot be used; else None.
    """
    for source in sources.values():
        if source.grouping == grouping:
            source.use_groups()
    return next((s.grouping for s in sources.values() if s.grouping not in (None, grouping)), None)


def fingerprint(data: str, annotations: list[Path]) -> str:
    """Identifies the data: a digest of the manifest, or of the annotation files."""
    digest = hashlib.sha256()
    if annotations:
        for path in annotations:
            digest.update(Path(path).read_bytes())
    else:
        digest.update(json.dumps(read_manifest(data), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _conversation_type(source: str) -> str:
    return next(name for name, of_source in SOURCES.items() if of_source == source)


# ---- Files of the release -------------------------------------------------------------------------------------------


class FolderSource:
    """Conversations of one source whose clouds are `.npy` files: one shard, read row by row.

    Raises:
        ValueError: clouds are missing.
    """

    is_normalized, grouping = False, None

    def __init__(self, samples: list[Sample], data_dir: str | Path):
        self.samples, self.data_dir = samples, Path(data_dir)
        self.rows = [len(samples)]
        present = {path.name for path in self.data_dir.iterdir()}
        annotated = {sample.object_id for sample in samples}
        missing = sorted(i for i in annotated if point_cloud_path(self.data_dir, i).name not in present)
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(annotated)} annotated objects have no cloud in {self.data_dir}, such as "
                f"object_id {missing[0]!r} ({point_cloud_path(self.data_dir, missing[0]).name}). `data` must be the "
                "folder of the .npy files that belong to `annotations`."
            )

    def read(self, shard: int, row: int) -> tuple[Sample, np.ndarray]:
        """The sample and its cloud, (8192, 6) float32."""
        sample = self.samples[row]
        return sample, read_point_cloud(self.data_dir, sample.object_id)

    def read_groups(self, shard: int, row: int) -> None:
        """They are found when the encoder needs them."""


# ---- Packed shards --------------------------------------------------------------------------------------------------


def read_manifest(data: str) -> dict:
    """packed.json of a folder or Hub id.

    Raises:
        ValueError: it has none.
    """
    if not Path(data).is_dir() and not is_hub_id(data):
        raise ValueError(f"`data` {data}: no such folder, and a data set on the Hub is named OWNER/NAME.")
    try:
        with _open(data, MANIFEST_FILE) as file:
            content = file.read()
    except Exception as error:  # of the disk, of JSON, or of the network's many clients
        raise ValueError(
            f"`data` {data}: no {MANIFEST_FILE} there ({one_line(error)[:200]}). Pass a folder or Hub id of packed data "
            "(minigpt3d pack), or a folder of .npy files together with `annotations`."
        ) from error
    place = f"`data` {data}: {MANIFEST_FILE}"
    manifest = parse_json(content, place, advice="Download the data or pack them again.")
    if not _is_manifest(manifest):
        raise ValueError(f"{place}: damaged, or no manifest of packed data. Download the data or pack them again.")
    return manifest


def _is_manifest(manifest: dict) -> bool:
    shards, footers = manifest.get("shards"), manifest.get("footers", {})  # earlier versions wrote no footers
    if not (isinstance(shards, dict) and isinstance(footers, dict) and isinstance(manifest.get("num_points"), int)):
        return False
    try:
        read_grouping(manifest)
    except TypeError:
        return False
    return all(
        isinstance(rows, list)
        and all(isinstance(number, int) and number >= 0 for number in rows)
        and (not footers or (isinstance(footers.get(name), list) and len(footers[name]) == len(rows)))
        for name, rows in shards.items()
    )


def read_grouping(manifest: dict) -> Grouping | None:
    """The groups that are packed, if any; earlier versions packed none. Raises a TypeError if the manifest is damaged."""
    groups = manifest.get("groups")
    return None if groups is None else Grouping(**groups)


def shard_name(source: str, index: int, count: int) -> str:
    """The file of a shard in a packed data set."""
    return f"{source}/train-{index:05d}-of-{count:05d}.parquet"


def footer_digest(file) -> str:
    """Digest of a Parquet file's size and footer, which tells where all of its pages are.

    Args:
        file: opened for reading in binary.

    Raises:
        ValueError: the file does not end as a Parquet file does.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    end = file.read(8)
    length = int.from_bytes(end[:4], "little")
    if end[4:] != b"PAR1" or length + 12 > size:
        raise ValueError("truncated, or no Parquet file")
    file.seek(size - 8 - length)
    return hashlib.sha256(f"{size} ".encode() + file.read(length)).hexdigest()


class PackedSource:
    """One source of a packed data set, in a folder or on the Hub.

    Row groups are read when they are needed; the ones used last are kept in memory. The groups of clouds, if they are
    packed, are read after `use_groups`.

    Args:
        data: folder or Hub id of the data set.
        manifest: its packed.json.
        name: of the source.

    Raises:
        ValueError: a shard in a folder is missing, or not the one that the manifest lists.
    """

    is_normalized = True

    def __init__(self, data: str, manifest: dict, name: str):
        self.data, self.name = data, name
        self.grouping, self.columns = read_grouping(manifest), COLUMNS
        self.rows = manifest["shards"].get(name, [])
        self.footers = manifest.get("footers", {}).get(name)
        self.num_points = manifest["num_points"]
        # A row group for each sample of a batch, or all groups of a small data set.
        self.groups_kept = max(64, min(256, sum(-(-rows // ROWS_PER_GROUP) for rows in self.rows)))
        self._groups: OrderedDict[tuple[int, int], dict] = OrderedDict()
        self._files: OrderedDict[int, object] = OrderedDict()
        if Path(data).is_dir():
            for shard in range(len(self.rows)):
                with self._damage_named(shard):
                    self._open_shard(shard).close()

    def read(self, shard: int, row: int) -> tuple[Sample, np.ndarray]:
        """The sample and its cloud, (num_points, 6) float32, normalized.

        Raises:
            ValueError: the row is out of schema, or its shard damaged; the message names the place.
        """
        sample = self.read_sample(shard, row)
        number, place = divmod(row, ROWS_PER_GROUP)
        group = self._group(shard, number)
        coord, color = (group[name][place].as_buffer() for name in ("coord", "color"))
        sizes = [0 if buffer is None else buffer.size for buffer in (coord, color)]
        if sizes != [6 * self.num_points, 3 * self.num_points]:
            raise ValueError(
                f"object_id {sample.object_id!r} ({sample.place}): expected {self.num_points} points, "
                f"{6 * self.num_points} and {3 * self.num_points} bytes; got {sizes[0]} and {sizes[1]}."
            )
        return sample, decode_cloud(coord, color)

    def use_groups(self):
        """Read the groups of clouds, too, from now on."""
        self.columns = (*COLUMNS, GROUPS_COLUMN)
        self._groups.clear()

    def read_groups(self, shard: int, row: int) -> np.ndarray | None:
        """The groups of a cloud, (G, 1+K) int16 indices of centers and neighbors; None without `use_groups`.

        Raises:
            ValueError: the row is out of schema, or its shard damaged; the message names the place.
        """
        if GROUPS_COLUMN not in self.columns:
            return None
        number, place = divmod(row, ROWS_PER_GROUP)
        content = self._group(shard, number)[GROUPS_COLUMN][place].as_buffer()
        shape = self.grouping.num_groups, 1 + self.grouping.group_size
        groups = np.frombuffer(content or b"", "<i2")
        if groups.size != shape[0] * shape[1] or groups.min() < 0 or groups.max() >= self.grouping.num_points:
            raise ValueError(f"{self._path(shard)}, row {row}: expected {self.grouping}, got {groups.size} indices.")
        return groups.reshape(shape)

    def read_sample(self, shard: int, row: int) -> Sample:
        """The sample without its cloud. Raises as `read`."""
        number, place = divmod(row, ROWS_PER_GROUP)
        group = self._group(shard, number)
        record = {
            "object_id": group["object_id"][place].as_py(),
            "conversation_type": _conversation_type(self.name),
            "conversations": group["conversations"][place].as_py(),
        }
        return to_sample(record, f"{self._path(shard)}, row {row}")[1]

    def _path(self, shard: int) -> str:
        return f"{self.data}/{shard_name(self.name, shard, len(self.rows))}"

    def _group(self, shard: int, number: int) -> dict:
        key = shard, number
        if key not in self._groups:
            with self._damage_named(shard):
                table = self._file(shard).read_row_group(number, columns=self.columns, use_threads=False)
                columns = {name: table[name] for name in self.columns}
            self._groups[key] = {  # usually one chunk, which need not be copied
                name: column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
                for name, column in columns.items()
            }
            if len(self._groups) > self.groups_kept:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _file(self, shard: int):
        if shard not in self._files:
            import pyarrow.parquet

            file = pyarrow.parquet.ParquetFile(self._open_shard(shard), page_checksum_verification=True)
            if file.metadata.num_rows != self.rows[shard]:
                raise ValueError(f"it has {file.metadata.num_rows} rows, expected {self.rows[shard]}")
            self._files[shard] = file
            if len(self._files) > self.groups_kept:
                self._files.popitem(last=False)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _open_shard(self, shard: int):
        """The file, after a comparison of its footer with the manifest."""
        file = _open(self.data, shard_name(self.name, shard, len(self.rows)))
        if self.footers is not None and footer_digest(file) != self.footers[shard]:
            raise ValueError(f"it is not the shard that {MANIFEST_FILE} lists")
        return file

    @contextmanager
    def _damage_named(self, shard: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the disk, of Parquet, or of the network's many clients
            reason = one_line(error).removeprefix(f"{self._path(shard)}: ")
            raise ValueError(
                f"{self._path(shard)} is damaged or missing: {reason[:200]}. Download the data or pack them again."
            ) from error

    def __getstate__(self) -> dict:
        """For worker processes, which open their own files."""
        return self.__dict__ | {"_groups": OrderedDict(), "_files": OrderedDict()}


def _open(data: str, path: str):
    """A file of a data set, opened for reading: local, or streamed from the Hub."""
    if Path(data).is_dir():
        return open(Path(data) / path, "rb")
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(f"datasets/{data}/{path}", "rb")
