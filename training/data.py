"""Conversations about point clouds, where they lie: the files of the PointLLM release, or packed shards.

The order: `read_records` (check each record) → `open_sources`, which gives a stage's mixture as sources of rows: a
`FolderSource` reads `.npy` files, a `PackedSource` Parquet shards (`pack`). Which rows a step trains on is in `stream`.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minigpt3d.processing_minigpt3d import clean_question


# Two clouds of the release whose colours are broken; the authors leave them out too.
CORRUPT_OBJECT_IDS = {"6760e543e1d645d5aaacd3803bcae524", "b91c0711149d460a8004f9c06d3b7f38"}
# The release's `conversation_type` → our name of the source. A record without a type is a brief description.
SOURCES = {
    "simple_description": "brief",
    "detailed_description": "detailed",
    "single_round": "single_round",
    "multi_round": "multi_round",
}
POINT_PLACEHOLDER = "<point>"
# Of packed data (see `pack`).
ROWS_PER_GROUP = 64
MANIFEST_FILE = "packed.json"


@dataclass(frozen=True)
class Sample:
    """One object and what is said about it: `rounds` holds (question, answer) pairs."""

    object_id: str
    rounds: tuple[tuple[str, str], ...]


# ---- Annotations ----------------------------------------------------------------------------------------------------


def read_annotations(paths: Iterable[str | Path]) -> dict[str, list[Sample]]:
    """Samples by source, without the corrupt objects.

    Raises:
        ValueError: as `read_records`.
    """
    samples: dict[str, list[Sample]] = {source: [] for source in SOURCES.values()}
    for source, sample, _ in read_records(paths):
        if sample.object_id not in CORRUPT_OBJECT_IDS:
            samples[source].append(sample)
    return samples


def read_records(paths: Iterable[str | Path]) -> Iterator[tuple[str, Sample, dict]]:
    """Source, sample and record, from JSON lists of `{object_id, conversation_type, conversations: [{from, value}, …]}`.

    Raises:
        ValueError: a file that is no JSON list, or a record out of schema; the message names its `object_id`.
    """
    for path in paths:
        for index, record in enumerate(_read_list(Path(path))):
            yield *to_sample(record, f"{path}, record {index}"), record


def _read_list(path: Path) -> list:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error}). --annotations takes PointLLM's JSON lists.") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a JSON list of records, got a {type(records).__name__}.")
    return records


def to_sample(record, where: str) -> tuple[str, Sample]:
    """Check one record and take it apart: (source, sample).

    Raises:
        ValueError: it is out of schema; the message begins with its `object_id` and `where`.
    """
    if not isinstance(record, dict) or not isinstance(record.get("object_id"), str):
        raise ValueError(f"{where}: expected an object with a string 'object_id', got {str(record)[:80]!r}.")
    object_id = record["object_id"]
    where = f"object_id {object_id!r} ({where})"

    kind = record.get("conversation_type", "simple_description")
    if kind not in SOURCES:
        raise ValueError(f"{where}: conversation_type must be one of {', '.join(SOURCES)}, got {kind!r}.")
    source = SOURCES[kind]

    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise ValueError(f"{where}: 'conversations' must be a list of question and answer in turn, got {turns!r:.80}.")
    for turn, speaker in zip(turns, ("human", "gpt") * (len(turns) // 2), strict=True):
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise ValueError(f"{where}: expected {{'from': '{speaker}', 'value': text}}, got {turn!r:.80}.")
    values = [turn["value"] for turn in turns]
    if values[0].count(POINT_PLACEHOLDER) != 1 or any(POINT_PLACEHOLDER in value for value in values[1:]):
        raise ValueError(
            f"{where}: '{POINT_PLACEHOLDER}' must stand once, in the first question; got {values!r:.120}."
        )

    questions = [value.replace(POINT_PLACEHOLDER, "").strip() for value in values[::2]]
    if source != "multi_round":  # the authors clean the questions of single rounds, and no answers
        questions = [clean_question(question) for question in questions]
    return source, Sample(object_id, tuple(zip(questions, values[1::2], strict=True)))


def to_messages(sample: Sample) -> list[dict]:
    """The sample as chat messages, the cloud in the first question."""
    messages = []
    for question, answer in sample.rounds:
        point_cloud = [] if messages else [{"type": "point_cloud"}]
        messages.append({"role": "user", "content": [*point_cloud, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


# ---- Clouds ---------------------------------------------------------------------------------------------------------


def point_cloud_path(data_dir: str | Path, object_id: str) -> Path:
    return Path(data_dir) / f"{object_id}_8192.npy"


def read_point_cloud(data_dir: str | Path, object_id: str) -> np.ndarray:
    """(8192, 6) float32 of an object: xyz in any unit, rgb in [0, 1].

    Raises:
        ValueError: the file is missing or does not hold such a cloud; the message names the object.
    """
    path = point_cloud_path(data_dir, object_id)
    try:
        cloud = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"object_id {object_id!r}: cannot read {path} ({error}).") from error
    if cloud.ndim != 2 or cloud.shape[1] != 6 or not len(cloud):
        raise ValueError(f"object_id {object_id!r}: {path} must have shape (points, 6), got {cloud.shape}.")
    if not np.isfinite(cloud).all():
        raise ValueError(f"object_id {object_id!r}: {path} holds NaN or infinite values.")
    if cloud[:, 3:].min() < 0 or cloud[:, 3:].max() > 1:
        raise ValueError(f"object_id {object_id!r}: {path} must have colours in [0, 1], got some outside.")
    return cloud.astype(np.float32)


def encode_cloud(cloud: np.ndarray) -> tuple[bytes, bytes]:
    """(N, 6), xyz in [-1, 1] and rgb in [0, 1] → 6 bytes a point of coordinates, 3 of colours."""
    coord = np.round((cloud[:, :3].astype(np.float64) + 1) * 32767.5)
    return coord.astype("<u2").tobytes(), np.round(cloud[:, 3:] * 255).astype(np.uint8).tobytes()


def decode_cloud(coord: bytes, color: bytes) -> np.ndarray:
    """What `encode_cloud` packed, (N, 6) float32; coordinates are off by at most 1.6e-5."""
    cloud = np.empty((len(color) // 3, 6), dtype=np.float32)
    cloud[:, :3] = np.frombuffer(coord, "<u2").reshape(-1, 3) * np.float32(1 / 32767.5) - np.float32(1)
    cloud[:, 3:] = np.frombuffer(color, np.uint8).reshape(-1, 3) * np.float32(1 / 255)
    return cloud


def augment(point_cloud: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A cloud as it might have come out of another scan, at random: the same object, so the same answers hold.

    The proportions change by up to 15 % along each axis; the object turns about the up axis y, half of the time by no
    more than 15°, since most objects stand straight; points are off by up to 1 % of the size; half of the clouds miss up
    to a third of their points on one side, as scans do; one in four has fewer points; both are filled up by repeating.
    Colours stay, as answers speak of them. The encoder has seen the very objects that the stages train on: without all
    this it knows them too well, and what comes next learns nothing about objects that it does not.

    Args:
        point_cloud: (N, 6) float32, xyz and rgb; it is left as it is.
        rng: where the chances come from.

    Returns:
        (N, 6) float32, not normalised again.
    """
    coord, color = point_cloud[:, :3], point_cloud[:, 3:]
    coord = (coord - coord.mean(0)) * rng.uniform(0.85, 1.15, size=3)
    angle = np.radians(rng.uniform(-15, 15) if rng.random() < 0.5 else rng.uniform(-180, 180))
    cos, sin = np.cos(angle), np.sin(angle)
    coord = coord @ np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    noise = rng.uniform(0, 0.01) * np.linalg.norm(coord, axis=1).max()
    cloud = np.concatenate([coord + rng.normal(scale=noise, size=coord.shape), color], axis=1).astype(np.float32)
    kept = np.arange(len(cloud))
    if rng.random() < 0.5:
        along = coord @ rng.normal(size=3)
        kept = np.flatnonzero(along <= np.quantile(along, rng.uniform(2 / 3, 1)))
    if rng.random() < 0.25:
        kept = rng.permutation(kept)[: rng.integers(len(kept) // 8 + 1, len(kept) + 1)]
    return cloud[np.resize(kept, len(cloud))]


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
