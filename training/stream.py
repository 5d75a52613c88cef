"""Which samples a step trains on, and how they get there: sources → a stage's steps → packed batches.

A step's batch is a row of slots, one for each sample. A slot has a piece of an epoch's shuffle to itself, so that
a process reads the shards that the pieces of its own slots go through, and no others. Processes share the slots of a step, and workers
share the slots of a process. So what a slot gets is a function of seed, step and slot alone: a resumed run goes on where it
stopped, to the bit, and neither the number of processes nor that of workers changes the samples of a step.

Shapes: R rows of a packed batch, T tokens of the longest, C clouds, K answer tokens.
"""

import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from minigpt3d.data.clouds import augment
from minigpt3d.data.records import Sample, to_messages
from minigpt3d.data.sources import ROWS_PER_GROUP

from .stages import Stage


# Without a kernel for packed sequences, attention costs the square of a row's length: short rows, not one long one.
LEAST_ROW_LENGTH = 256


# ---- Which row ------------------------------------------------------------------------------------------------------


class Order:
    """The row that a slot gets at its source's n-th turn; no row comes twice in an epoch, and each epoch has its own order.

    An epoch puts the shards one behind the other in a new order, each shuffled inside, and cuts this row of rows into one
    piece for each slot, which reads the shards that its piece goes through. Fewer rows than slots are left out of an epoch.

    Args:
        rows: of each shard.
        batch: slots of a step.
        seed: of the order.
    """

    def __init__(self, rows: list[int], batch: int, seed: list[int]):
        self.rows, self.batch, self.seed = rows, batch, seed
        self.piece = sum(rows) // batch  # rows of a slot in an epoch
        self._kept: dict[tuple[int, ...], np.ndarray] = {}

    def address(self, turn: int, slot: int) -> tuple[int, int]:
        """(shard, row)."""
        if self.piece:
            epoch, position = divmod(turn, self.piece)
            position += slot * self.piece
        else:  # less than a batch: an epoch ends within a step
            epoch, position = divmod(turn * self.batch + slot, sum(self.rows))
        shards = self._permutation(len(self.rows), epoch)
        ends = self._keep((epoch, -1), lambda rng: np.cumsum([self.rows[shard] for shard in shards]))
        place = int(np.searchsorted(ends, position, side="right"))
        shard = int(shards[place])
        return shard, int(self._rows_of(shard, epoch)[position - int(ends[place]) + self.rows[shard]])

    def _permutation(self, count: int, epoch: int) -> np.ndarray:
        return self._keep((epoch,), lambda rng: rng.permutation(count))

    def _rows_of(self, shard: int, epoch: int) -> np.ndarray:
        """Rows of a shard, shuffled group by group: a group is read once and used up before the next."""
        groups = range(0, self.rows[shard], ROWS_PER_GROUP)

        def shuffle(rng: np.random.Generator) -> np.ndarray:
            parts = [first + rng.permutation(min(ROWS_PER_GROUP, self.rows[shard] - first)) for first in groups]
            return np.concatenate([parts[i] for i in rng.permutation(len(parts))])

        return self._keep((epoch, shard), shuffle)

    def _keep(self, key: tuple[int, ...], make) -> np.ndarray:
        if key not in self._kept:
            if len(self._kept) > 4 * self.batch:
                self._kept.clear()
            self._kept[key] = make(np.random.default_rng([*self.seed, *(number + 1 for number in key)]))
        return self._kept[key]


class StageStream:
    """The samples of a stage, by step and slot.

    Args:
        stage: the row, for its mixture and augmentation.
        sources: by name, as `open_sources` returns them.
        processor: a `MiniGPT3DProcessor`.
        seed: of the draws, the order and the augmentation.
        process_index, num_processes: which slots are ours.
    """

    def __init__(
        self, stage: Stage, sources: dict, processor, seed: int, process_index: int = 0, num_processes: int = 1
    ):
        self.stage, self.sources, self.processor = stage, sources, processor
        self.seed = [seed, *stage.name.encode()]
        self.process_index, self.num_processes = process_index, num_processes
        per_sample = stage.draw_each == "sample"
        if per_sample and len({source.batch for source in stage.mixture}) > 1:
            raise ValueError(f"Stage {stage.name} draws each sample's source: give all sources the same batch.")
        weights = np.array([source.weight for source in stage.mixture], dtype=float)
        size = stage.steps, stage.mixture[0].batch if per_sample else 1
        # Index of the source that is drawn, for each step, and for each slot if they are drawn apart.
        self.draws = self._rng("source").choice(len(weights), size=size, p=weights / weights.sum())
        # How often that source was drawn before: its own clock.
        self.turns = np.zeros(size, dtype=np.int64)
        for index in range(len(weights)):
            drawn = self.draws == index
            self.turns[drawn] = np.arange(drawn.sum())
        self.orders = {
            source.name: Order(
                sources[source.name].rows, 1 if per_sample else source.batch, [*self.seed, *source.name.encode()]
            )
            for source in stage.mixture
        }

    def _rng(self, purpose: str, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([*self.seed, *purpose.encode(), *numbers])

    def source_name(self, step: int) -> str:
        return "mixed" if self.stage.draw_each == "sample" else self.stage.mixture[self.draws[step, 0]].name

    def batch(self, step: int) -> int:
        """Samples of a step, over all processes."""
        return self.stage.mixture[self.draws[step, 0]].batch

    def slots(self, step: int) -> range:
        """The slots of a step that this process trains on; slot 0 for one that is idle, and has to keep step."""
        if self.is_idle(step):
            return range(0, 1)
        return range(self.process_index, self.batch(step), self.num_processes)

    def is_idle(self, step: int) -> bool:
        """Whether the step has fewer samples than there are processes, and none for this one."""
        return self.process_index >= self.batch(step)

    def draw(self, step: int, slot: int) -> tuple[str, tuple[int, int]]:
        """The source of a slot's sample, and its shard and row there."""
        column, order_slot = (slot, 0) if self.stage.draw_each == "sample" else (0, slot)
        name = self.stage.mixture[self.draws[step, column]].name
        return name, self.orders[name].address(int(self.turns[step, column]), order_slot)

    def encode(self, step: int, slot: int) -> dict[str, torch.Tensor]:
        """One sample: `input_ids` and `labels` (T,), `point_clouds` (1, N, 6)."""
        name, address = self.draw(step, slot)
        sample, cloud = self.sources[name].read(*address)
        if self.stage.augment:
            cloud = augment(cloud, self._rng("augment", step, slot))
        encoded = encode_sample(self.processor, sample, cloud, self.stage)
        if self.is_idle(step):
            encoded["labels"].fill_(-100)
        return encoded


def encode_sample(processor, sample: Sample, cloud: np.ndarray, stage: Stage) -> dict[str, torch.Tensor]:
    """One sample: `input_ids` and `labels` (T,), `point_clouds` (1, N, 6)."""
    batch = processor.encode_training([to_messages(sample)], [cloud], stage.max_text_length)
    return {"input_ids": batch["input_ids"][0], "labels": batch["labels"][0], "point_clouds": batch["point_clouds"]}


# ---- From workers to the loop ---------------------------------------------------------------------------------------


class _Steps(IterableDataset):
    """The samples of each step, in one worker those of its own slots."""

    def __init__(self, stream: StageStream, steps: range):
        self.stream, self.steps = stream, steps

    def __iter__(self) -> Iterator[list]:
        worker = get_worker_info()
        first, count = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in self.steps:
            yield [(slot, self.stream.encode(step, slot)) for slot in self.stream.slots(step)[first::count]]


def read_ahead(stream: StageStream, steps: range, num_workers: int) -> Iterator[tuple[str, list[dict]]]:
    """For each of `steps` its source's name and this process's samples by slot, read ahead by `num_workers` processes."""
    ahead = {"prefetch_factor": 4, "worker_init_fn": _ignore_signals} if num_workers else {}
    loader = DataLoader(_Steps(stream, steps), batch_size=None, num_workers=num_workers, **ahead)
    parts = iter(loader)
    for step in steps:
        # The loader takes from its workers in turn, so a step is one item of each.
        samples = dict(item for _ in range(max(num_workers, 1)) for item in next(parts))
        yield stream.source_name(step), [samples[slot] for slot in sorted(samples)]


def _ignore_signals(worker_id: int):
    """Ctrl-C and schedulers reach every process of a run; the loop still needs its workers to finish the step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def split_micro_batches(samples: list[dict], device_batch: int | None) -> list[list[dict]]:
    size = device_batch or len(samples)
    return [samples[first : first + size] for first in range(0, len(samples), size)]


# ---- Batches --------------------------------------------------------------------------------------------------------


def takes_one_row(model: torch.nn.Module) -> bool:
    """Whether the language model's attention skips what packed samples do not see of each other, however long the row."""
    return (model.config.text_config._attn_implementation or "").startswith("flash")


def pack_batch(samples: list[dict], one_row: bool = False) -> dict[str, torch.Tensor]:
    """Samples one behind the other instead of padded, as few rows as they fill.

    Positions begin anew at each sample, which is how transformers tells that it must not see the ones before it.

    Args:
        samples: of `StageStream.encode`.
        one_row: everything in one row, for attention kernels that skip what is masked.

    Returns:
        `input_ids`, `position_ids` and `labels` (R, T), `logits_to_keep` (R, T) bool, true where the next token is an
        answer's (K of them), and `point_clouds` (C, N, 6) in the order of the rows.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]
    limit = sum(lengths) if one_row else max(LEAST_ROW_LENGTH, *lengths)
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(samples)), key=lambda i: -lengths[i]):  # first fit, longest first
        row = next((number for number, free in enumerate(room) if free >= lengths[index]), None)
        if row is None:
            rows.append([])
            room.append(limit)
            row = len(rows) - 1
        rows[row].append(index)
        room[row] -= lengths[index]
    width = limit - min(room)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    position_ids = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        end = 0
        for index in row:
            first, end = end, end + lengths[index]
            input_ids[number, first:end] = samples[index]["input_ids"]
            labels[number, first:end] = samples[index]["labels"]
            position_ids[number, first:end] = torch.arange(lengths[index])
        position_ids[number, end:] = torch.arange(width - end)  # the rest of the row is a sample of nothing
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "labels": labels,
        "logits_to_keep": torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:] != -100,
        "point_clouds": torch.cat([samples[index]["point_clouds"] for row in rows for index in row]),
    }


def pad_batch(samples: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """The same samples as the authors have them: a row each, padded on the right to the longest."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [sample["input_ids"] for sample in samples]
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad([sample["labels"] for sample in samples], batch_first=True, padding_value=-100),
        "point_clouds": torch.cat([sample["point_clouds"] for sample in samples]),
    }
