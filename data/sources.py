"""Conversations about point clouds, where they lie: the files of the PointLLM release, or packed shards.

The order: `read_records` (check each record) → `open_sources`, which gives a stage's mixture as sources of rows: a
`FolderSource` reads `.npy` files, a `PackedSource` Parquet shards (`pack`). Which rows a step trains on is in `stream`.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .clouds import decode_cloud, point_cloud_path, read_point_cloud
from .records import SOURCES, Sample, read_annotations, to_sample


# Of packed data (see `pack`).
ROWS_PER_GROUP = 64
MANIFEST_FILE = "packed.json"


# ---- Annotations ----------------------------------------------------------------------------------------------------


# ---- Clouds ---------------------------------------------------------------------------------------------------------


# ---- Sources --------------------------------------------------------------------------------------------------------


class FolderSource:
    """Conversations of one kind whose clouds are `.npy` files: one shard, read row by row.

    Raises:
        ValueError: clouds are missing.
    """

    def __init__(self, samples: list[Sample], data_dir: str | Path):
        self.samples, self.data_dir = samples, Path(data_dir)
        self.rows = [len(samples)]
        present = {path.name for path in self.data_dir.iterdir()}
        wanted = {sample.object_id for sample in samples}
        missing = sorted(i for i in wanted if point_cloud_path(self.data_dir, i).name not in present)
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(wanted)} annotated objects have no cloud in {self.data_dir}, such as "
                f"object_id {missing[0]!r} ({point_cloud_path(self.data_dir, missing[0]).name}). --data must be the "
                "folder of the .npy files that belong to --annotations."
            )

    def read(self, shard: int, row: int) -> tuple[Sample, np.ndarray]:
        """The sample and its cloud, (8192, 6) float32."""
        sample = self.samples[row]
        return sample, read_point_cloud(self.data_dir, sample.object_id)


class PackedSource:
    """One kind of conversations in a data set of `minigpt3d pack`, in a folder or on the Hub.

    Row groups are read as they are needed and kept while they are in use; nothing else is.

    Args:
        dataset: folder or Hub id.
        manifest: its packed.json.
        name: of the source.
    """

    def __init__(self, dataset: str, manifest: dict, name: str):
        self.dataset, self.name = dataset, name
        self.rows = manifest["shards"].get(name, [])
        self.num_points = manifest["num_points"]
        # A row group for each sample of a batch, or the whole of a small data set.
        self.groups_kept = max(64, min(256, sum(-(-rows // ROWS_PER_GROUP) for rows in self.rows)))
        self._groups: OrderedDict[tuple[int, int], dict] = OrderedDict()
        self._files: OrderedDict[int, object] = OrderedDict()

    def read(self, shard: int, row: int) -> tuple[Sample, np.ndarray]:
        """The sample and its cloud, (num_points, 6) float32, normalised.

        Raises:
            ValueError: the row is out of schema; the message names its object.
        """
        sample = self.read_sample(shard, row)
        number, place = divmod(row, ROWS_PER_GROUP)
        group = self._group(shard, number)
        cloud = decode_cloud(group["coord"][place].as_buffer(), group["color"][place].as_buffer())
        if cloud.shape != (self.num_points, 6):
            raise ValueError(
                f"object_id {sample.object_id!r} ({self._where(shard, row)}): expected {self.num_points} points, got "
                f"{len(cloud)}."
            )
        return sample, cloud

    def read_sample(self, shard: int, row: int) -> Sample:
        """What is said, without the cloud. Raises as `read`."""
        number, place = divmod(row, ROWS_PER_GROUP)
        group = self._group(shard, number)
        record = {
            "object_id": group["object_id"][place].as_py(),
            "conversation_type": next(kind for kind, source in SOURCES.items() if source == self.name),
            "conversations": group["conversations"][place].as_py(),
        }
        return to_sample(record, self._where(shard, row))[1]

    def _where(self, shard: int, row: int) -> str:
        return f"{self.dataset}, {self.name}, shard {shard}, row {row}"

    def _group(self, shard: int, number: int) -> dict:
        key = shard, number
        if key not in self._groups:
            table = self._file(shard).read_row_group(number, use_threads=False)
            columns = {name: table[name] for name in table.column_names}
            self._groups[key] = {  # one chunk as a rule, which need not be copied
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

            path = f"{self.name}/train-{shard:05d}-of-{len(self.rows):05d}.parquet"
            self._files[shard] = pyarrow.parquet.ParquetFile(_open(self.dataset, path))
            if len(self._files) > self.groups_kept:
                self._files.popitem(last=False)
        self._files.move_to_end(shard)
        return self._files[shard]

    def __getstate__(self) -> dict:
        """For worker processes, which open files of their own."""
        return self.__dict__ | {"_groups": OrderedDict(), "_files": OrderedDict()}


def _open(dataset: str, path: str):
    """A file of a data set, to read from: local, or streamed from the Hub."""
    if Path(dataset).is_dir():
        return open(Path(dataset) / path, "rb")
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(f"datasets/{dataset}/{path}", "rb")


def read_manifest(dataset: str) -> dict:
    """packed.json of a folder or Hub id.

    Raises:
        ValueError: it has none.
    """
    if not Path(dataset).is_dir() and (Path(dataset).is_absolute() or str(dataset).count("/") != 1):
        raise ValueError(f"--data {dataset}: no such folder, and a data set on the Hub is named OWNER/NAME.")
    try:
        with _open(dataset, MANIFEST_FILE) as file:
            return json.loads(file.read())
    except Exception as error:  # of the disk, of JSON, or in many ways of the network
        raise ValueError(
            f"--data {dataset}: no {MANIFEST_FILE} there ({' '.join(str(error).split())[:200]}). Pass what `minigpt3d pack` wrote, a folder or the Hub "
            "id of one; or a folder of .npy files together with --annotations."
        ) from error


def open_sources(names: Iterable[str], dataset: str, annotations: list[Path], any_source: bool = False) -> dict:
    """The sources of a mixture by name: `.npy` files with annotations, or packed data without.

    Args:
        any_source: leave out sources that have no samples, as long as one has.

    Raises:
        ValueError: a source has no samples, clouds are missing, or records are out of schema.
    """
    names = list(names)
    if annotations:
        samples = read_annotations(annotations)
    else:
        manifest = read_manifest(dataset)
        samples = manifest["shards"]
    found = [name for name in names if any(samples.get(name, ()))]
    absent = [name for name in names if name not in found]
    if absent and not (any_source and found):
        where = "Give --annotations a file with" if annotations else "Pack annotations with"
        raise ValueError(
            f"The stage trains on {absent[0]!r} conversations, but there are none. {where} conversation_type "
            f"{_release_name(absent[0])!r}{'' if annotations else ' too'}."
        )
    if annotations:
        return {name: FolderSource(samples[name], dataset) for name in found}
    return {name: PackedSource(dataset, manifest, name) for name in found}


def fingerprint(dataset: str, annotations: list[Path]) -> str:
    """By which data are told from others: a digest of the manifest, or of the annotation files."""
    digest = hashlib.sha256()
    if annotations:
        for path in annotations:
            digest.update(Path(path).read_bytes())
    else:
        digest.update(json.dumps(read_manifest(dataset), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _release_name(source: str) -> str:
    return next(kind for kind, name in SOURCES.items() if name == source)
