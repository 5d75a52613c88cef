"""Conversations about point clouds, from the files of the PointLLM release to a stage's batches.

The order: `read_annotations` (check each record, skip the two corrupt objects, sort by source) → `StageBatches`, which
for each optimizer step draws a source and its samples, reads their clouds (`read_point_cloud`), augments them where the
recipe says so (`augment`) and encodes them with the processor. Every step is a function of the seed and the step's
number alone, so a resumed run goes on where it stopped and the number of workers changes nothing.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from minigpt3d.processing_minigpt3d import clean_question

from .stages import Source, Stage


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


@dataclass(frozen=True)
class Sample:
    """One object and what is said about it: `rounds` holds (question, answer) pairs."""

    object_id: str
    rounds: tuple[tuple[str, str], ...]


# ---- Annotations ----------------------------------------------------------------------------------------------------


def read_annotations(paths: Iterable[str | Path]) -> dict[str, list[Sample]]:
    """Samples by source, from JSON lists of `{object_id, conversation_type, conversations: [{from, value}, …]}`.

    Raises:
        ValueError: a file that is no JSON list, or a record out of schema; the message names its `object_id`.
    """
    samples: dict[str, list[Sample]] = {source: [] for source in SOURCES.values()}
    for path in paths:
        for index, record in enumerate(_read_list(Path(path))):
            source, sample = _to_sample(record, f"{path}, record {index}")
            if sample.object_id not in CORRUPT_OBJECT_IDS:
                samples[source].append(sample)
    return samples


def _read_list(path: Path) -> list:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file ({error}). --annotations takes PointLLM's JSON lists.") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a JSON list of records, got a {type(records).__name__}.")
    return records


def _to_sample(record, where: str) -> tuple[str, Sample]:
    """Check one record and take it apart: (source, sample)."""
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


# ---- Batches --------------------------------------------------------------------------------------------------------


class StageBatches(Dataset):
    """The batches of a stage: item `step` is what this process trains on at that optimizer step.

    An item is `(source name, micro-batches)`. A micro-batch is a dict of what the model takes: `input_ids`,
    `attention_mask`, `labels` (B, T) and `point_clouds` (B, N, 6), with B at most `device_batch`. The samples of a step
    are dealt out to the processes in turn, so a step is the same set of samples on any number of them.

    Args:
        stage: the row, for its mixture and augmentation.
        samples: by source, as `read_annotations` returns them.
        data_dir: the folder of `{object_id}_8192.npy`.
        processor: a `MiniGPT3DProcessor`.
        seed: of the draws, the order and the augmentation.
        device_batch: the largest micro-batch; None for the whole share of a process.
        process_index, num_processes: which share is ours.

    Raises:
        ValueError: a source of the mixture has no samples, clouds are missing, or a batch has fewer samples than there
            are processes.
    """

    def __init__(
        self,
        stage: Stage,
        samples: dict[str, list[Sample]],
        data_dir: str | Path,
        processor,
        seed: int,
        device_batch: int | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.stage = stage
        self.samples = {source.name: samples.get(source.name, []) for source in stage.mixture}
        self.data_dir = Path(data_dir)
        self.processor = processor
        self.seed = [seed, *stage.name.encode()]
        self.device_batch = device_batch
        self.process_index = process_index
        self.num_processes = num_processes
        self._check()
        weights = np.array([source.weight for source in stage.mixture], dtype=float)
        self.draws = self._rng("source").choice(len(weights), size=stage.steps, p=weights / weights.sum())  # (steps,)
        # How often the source of a step was drawn before it: where that source's own order stands.
        self.earlier_draws = np.zeros(stage.steps, dtype=np.int64)
        for source in range(len(weights)):
            (steps,) = np.nonzero(self.draws == source)
            self.earlier_draws[steps] = np.arange(len(steps))
        self._orders: dict[str, tuple[int, np.ndarray]] = {}  # of each source, the last epoch asked for

    def _check(self):
        for source in self.stage.mixture:
            if not self.samples[source.name]:
                raise ValueError(
                    f"Stage {self.stage.name} trains on {source.name!r} conversations, but the annotations hold none. "
                    f"Give --annotations a file with conversation_type {_release_name(source.name)!r}."
                )
            if source.batch < self.num_processes:
                raise ValueError(
                    f"Stage {self.stage.name}: a batch of {source.batch} {source.name!r} samples cannot be shared by "
                    f"{self.num_processes} processes. Launch at most {source.batch}."
                )
        present = {path.name for path in self.data_dir.iterdir()}
        wanted = {sample.object_id for samples in self.samples.values() for sample in samples}
        missing = sorted(i for i in wanted if point_cloud_path(self.data_dir, i).name not in present)
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(wanted)} annotated objects have no cloud in {self.data_dir}, such as "
                f"object_id {missing[0]!r} ({point_cloud_path(self.data_dir, missing[0]).name}). --data must be the "
                "folder of the .npy files that belong to --annotations."
            )

    def _rng(self, purpose: str, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([*self.seed, *purpose.encode(), *numbers])

    def _order(self, source: str, epoch: int) -> np.ndarray:
        if source not in self._orders or self._orders[source][0] != epoch:
            self._orders[source] = epoch, self._rng(source, epoch).permutation(len(self.samples[source]))
        return self._orders[source][1]

    def __len__(self) -> int:
        return self.stage.steps

    def plan(self, step: int) -> tuple[Source, list[Sample]]:
        """The source of a step and all its samples. A source is gone through as a whole before it starts anew."""
        source = self.stage.mixture[self.draws[step]]
        samples = self.samples[source.name]
        first = int(self.earlier_draws[step]) * source.batch
        positions = (divmod(first + i, len(samples)) for i in range(source.batch))
        return source, [samples[self._order(source.name, epoch)[position]] for epoch, position in positions]

    def __getitem__(self, step: int) -> tuple[str, list[dict[str, torch.Tensor]]]:
        source, samples = self.plan(step)
        ours = list(enumerate(samples))[self.process_index :: self.num_processes]
        size = self.device_batch or len(ours)
        micro_batches = [self._encode(step, ours[first : first + size]) for first in range(0, len(ours), size)]
        return source.name, micro_batches

    def _encode(self, step: int, numbered_samples: list[tuple[int, Sample]]) -> dict[str, torch.Tensor]:
        clouds = [read_point_cloud(self.data_dir, sample.object_id) for _, sample in numbered_samples]
        if self.stage.augment:
            clouds = [
                augment(cloud, self._rng("augment", step, number))
                for cloud, (number, _) in zip(clouds, numbered_samples, strict=True)
            ]
        conversations = [to_messages(sample) for _, sample in numbered_samples]
        return dict(self.processor.encode_training(conversations, clouds, self.stage.max_text_length))


def _release_name(source: str) -> str:
    return next(kind for kind, name in SOURCES.items() if name == source)


def make_loader(batches: StageBatches, steps: range, num_workers: int) -> DataLoader:
    """The batches of these steps, in order, prepared ahead by `num_workers` processes."""
    return DataLoader(batches, batch_size=None, sampler=steps, num_workers=num_workers)
