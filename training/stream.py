"""The samples of every step, and their way there: sources → a stage's steps → packed batches.

The batch of a step is a row of slots, one for each sample. Every slot has its own piece of an epoch's shuffle, so a
process reads only the shards of its own slots. The slots of a step are divided among processes, those of a process among
workers. The sample of a slot depends on seed, step and slot only: a resumed run continues bit for bit, and neither the
number of processes nor that of workers changes the samples of a step.

Shapes: R rows of a packed batch, T tokens of the longest, C clouds, Q point vectors of a cloud, K answer tokens.
"""

import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from minigpt3d.data.clouds import augment, choose_points
from minigpt3d.data.reading import end_with_parent
from minigpt3d.data.records import Sample, to_messages
from minigpt3d.data.sources import ROWS_PER_GROUP
from minigpt3d.messages import one_line

from .stages import Stage


# Without a kernel for packed sequences, attention costs the square of a row's length: several short rows are cheaper.
MIN_ROW_LENGTH = 256
BUCKET = 64


# ---- Order of the rows ----------------------------------------------------------------------------------------------


class Order:
    """The row that a slot gets at its source's n-th turn. No row comes twice in an epoch; every epoch has its own order.

    An epoch concatenates the shards in a new order, each shuffled inside, and cuts this sequence into one piece for each
    slot. The remainder, fewer rows than slots, is left out of the epoch.

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
        else:  # fewer rows than a batch: an epoch ends within a step
            epoch, position = divmod(turn * self.batch + slot, sum(self.rows))
        shards = self._keep((epoch,), lambda rng: rng.permutation(len(self.rows)))
        ends = self._keep((epoch, -1), lambda rng: np.cumsum([self.rows[shard] for shard in shards]))
        place = int(np.searchsorted(ends, position, side="right"))
        shard = int(shards[place])
        return shard, int(self._rows_of(shard, epoch)[position - int(ends[place]) + self.rows[shard]])

    def _rows_of(self, shard: int, epoch: int) -> np.ndarray:
        """Rows of a shard, shuffled group by group: a row group is read once and used up before the next."""
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
        process_index, num_processes: which slots belong to this process.
    """

    def __init__(
        self, stage: Stage, sources: dict, processor, seed: int, process_index: int = 0, num_processes: int = 1
    ):
        self.stage, self.sources, self.processor = stage, sources, processor
        self.seed = [seed, *stage.name.encode()]
        self.process_index, self.num_processes = process_index, num_processes
        per_sample = stage.draw_each == "sample"
        if per_sample and len({source.batch for source in stage.mixture}) > 1:
            raise ValueError(f"{stage.title} draws each sample's source: give all sources the same batch.")
        weights = np.array([source.weight for source in stage.mixture], dtype=float)
        size = stage.steps, stage.mixture[0].batch if per_sample else 1
        # Index of the source that is drawn, for each step, or for each slot if every sample draws its own.
        self.draws = self._rng("source").choice(len(weights), size=size, p=weights / weights.sum())
        # How often that source was drawn before.
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
        """The slots of a step for this process; slot 0 for an idle one, which must take part in the step."""
        if self.is_idle(step):
            return range(0, 1)
        return range(self.process_index, self.batch(step), self.num_processes)

    def is_idle(self, step: int) -> bool:
        """Whether the step has no sample for this process, because it has fewer samples than there are processes."""
        return self.process_index >= self.batch(step)

    def draw(self, step: int, slot: int) -> tuple[str, tuple[int, int]]:
        """The source of a slot's sample, and its shard and row there."""
        column, order_slot = (slot, 0) if self.stage.draw_each == "sample" else (0, slot)
        name = self.stage.mixture[self.draws[step, column]].name
        return name, self.orders[name].address(int(self.turns[step, column]), order_slot)

    def encode(self, step: int, slot: int) -> dict[str, torch.Tensor]:
        """One sample: `input_ids` and `labels` (T,), `point_clouds` (1, N, 6); see `encode_row`."""
        name, address = self.draw(step, slot)
        if self.stage.augment:
            sample, cloud = self.sources[name].read(*address)
            cloud = augment(cloud, self._rng("augment", step, slot))
            encoded = encode_sample(self.processor, sample, cloud, self.stage)
        else:
            encoded = encode_row(self.processor, self.sources[name], address, self.stage)
        if self.is_idle(step):
            encoded["labels"].fill_(-100)
        return encoded


def encode_row(processor, source, address: tuple[int, int], stage: Stage) -> dict[str, torch.Tensor]:
    """The sample of a row as it is, see `encode_sample`; with `group_indices` (1, G, 1+K) if the source reads groups.

    Args:
        source: of `open_sources`.
        address: (shard, row).
    """
    sample, cloud = source.read(*address)
    encoded = encode_sample(processor, sample, cloud, stage, source.is_normalized)
    groups = source.read_groups(*address)
    return encoded if groups is None else encoded | {"group_indices": torch.from_numpy(groups[None].copy())}


def encode_sample(
    processor, sample: Sample, cloud: np.ndarray, stage: Stage, is_normalized: bool = False
) -> dict[str, torch.Tensor]:
    """One sample: `input_ids` and `labels` (T,), `point_clouds` (1, N, 6).

    Args:
        is_normalized: whether the cloud is as it was packed.

    Raises:
        ValueError: it cannot be encoded; the message names the object and where it was read.
    """
    try:
        if is_normalized:
            extractor = processor.feature_extractor
            cloud = choose_points(cloud, extractor.num_points, extractor.seed)
        messages, length = [to_messages(sample)], stage.max_text_length
        batch = processor.encode_training(messages, [cloud], length, do_normalize=not is_normalized)
    except Exception as error:  # tokenizers have errors of their own
        raise ValueError(f"object_id {sample.object_id!r} ({sample.place}): {one_line(error)[:300]}") from error
    return {"input_ids": batch["input_ids"][0], "labels": batch["labels"][0], "point_clouds": batch["point_clouds"]}


# ---- From workers to the loop ---------------------------------------------------------------------------------------


class _Steps(IterableDataset):
    """The samples of each step; a worker yields those of its own slots, or at last why one cannot be read."""

    def __init__(self, stream: StageStream, steps: range):
        self.stream, self.steps = stream, steps

    def __iter__(self) -> Iterator[list]:
        worker = get_worker_info()
        first, count = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in self.steps:
            try:
                samples = [(slot, self.stream.encode(step, slot)) for slot in self.stream.slots(step)[first::count]]
            except (OSError, ValueError) as error:  # the loader would put its traceback into the message
                yield ValueError(one_line(error))
                return
            yield samples


def read_ahead(stream: StageStream, steps: range, num_workers: int) -> Iterator[tuple[str, list[dict]]]:
    """Name of the source and samples of this process, for each of `steps`, read ahead by `num_workers` processes.

    Raises:
        ValueError: a sample cannot be read or encoded; the message names its place.
    """
    ahead = {"prefetch_factor": 4, "worker_init_fn": _prepare_worker} if num_workers else {}
    loader = DataLoader(_Steps(stream, steps), batch_size=None, num_workers=num_workers, **ahead)
    parts = iter(loader)
    for step in steps:
        # The loader takes from its workers in turn, so a step is one item from each.
        samples = {}
        for _ in range(max(num_workers, 1)):
            part = next(parts)
            if isinstance(part, ValueError):
                raise part
            samples.update(part)
        yield stream.source_name(step), [samples[slot] for slot in sorted(samples)]


def _prepare_worker(worker_id: int):
    """Ctrl-C and schedulers signal every process of a run, but the loop needs its workers to finish the step."""
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def split_micro_batches(samples: list[dict], device_batch: int | None, share: int) -> list[list[dict]]:
    """Divide a process's samples of a step into lists of at most `device_batch`, nearly equal in number.

    Args:
        share: the most samples that a process has in this step. Every process gets as many lists, because those that
            share sharded weights must compute together: one that has too few samples repeats its last, without loss.
    """
    count = math.ceil(share / (device_batch or share))
    ends = [len(samples) * number // count for number in range(count + 1)]
    lists = [samples[first:end] for first, end in pairwise(ends)]
    idle = samples[-1] | {"labels": torch.full_like(samples[-1]["labels"], -100)}
    return sorted((part or [idle] for part in lists), key=lambda part: part[0] is idle)


# ---- Batches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """How samples are laid out for the attention of a language model.

    Args:
        one_row: all samples in one row, for kernels that compute nothing between samples and read their boundaries.
        masked: the batch has the attention mask, which spares the language model from deriving it from positions.
        point_token_id, num_query_tokens: of the model, whose placeholders are then found and counted before the batch
            leaves the CPU.
    """

    one_row: bool = False
    masked: bool = False
    point_token_id: int | None = None
    num_query_tokens: int | None = None

    @classmethod
    def of(cls, model: torch.nn.Module) -> "Packing":
        config = model.config.text_config
        implementation = config._attn_implementation or ""
        windows = (
            getattr(config, "sliding_window", None),
            "sliding_attention" in (getattr(config, "layer_types", None) or ()),
        )
        return cls(
            implementation.startswith("flash"),
            implementation == "sdpa"
            and not any(windows),  # a backbone with windows makes a mask for each kind of layer
            model.config.point_token_id,
            model.config.num_query_tokens,
        )


PLAIN = Packing()


def pack_batch(samples: list[dict], packing: Packing = PLAIN) -> dict:
    """Concatenate samples into as few rows as they fill, instead of padding each.

    Positions restart at each sample, and a sample does not attend to others. Rows and answers are padded to multiples of
    `BUCKET`, so that few shapes occur.

    Args:
        samples: of `StageStream.encode`.
        packing: for the model; by default for any, which then finds placeholders and mask by itself.

    Returns:
        `input_ids` and `position_ids` (R, T); `answer_positions` (K,), where the next token belongs to an answer, as
        positions in the flattened rows, and `labels` (1, K), these next tokens, -100 for padding; `point_clouds`
        (C, N, 6) in the order of the rows; `group_indices` (C, G, 1+K) if the samples have them.
        For a model: `point_positions` (C*Q,), of the placeholders in the flattened rows.
        With `masked`: `attention_mask` (R, 1, T, T) bool.
        With `one_row`: `cu_seq_lens_q` and `cu_seq_lens_k` (samples + 1,) int32, `max_length_q` and `max_length_k` int.

    Raises:
        ValueError: a sample has not as many placeholders as its clouds need.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]
    limit = sum(lengths) if packing.one_row else max(MIN_ROW_LENGTH, *lengths)
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
    width = _round_up(limit - min(room))
    input_ids, position_ids = torch.zeros(2, len(rows), width, dtype=torch.long)
    following = torch.full((len(rows), width), -100)  # the next token, where it belongs to an answer
    sample_ids = torch.full((len(rows), width), -1, dtype=torch.int16)
    ends = [0]
    for number, row in enumerate(rows):
        end = 0
        for index in row:
            first, end = end, end + lengths[index]
            input_ids[number, first:end] = samples[index]["input_ids"]
            following[number, first : end - 1] = samples[index]["labels"][1:]
            position_ids[number, first:end] = torch.arange(lengths[index])
            sample_ids[number, first:end] = index
            ends.append(end)
        position_ids[number, end:] = torch.arange(width - end)  # padding, as a sample of its own
    batch = {"input_ids": input_ids, "position_ids": position_ids}
    answers = (following.flatten() != -100).nonzero().flatten()  # (K,)
    missing = _round_up(max(len(answers), 1)) - len(answers)
    batch["answer_positions"] = torch.nn.functional.pad(answers, (0, missing))
    batch["labels"] = torch.nn.functional.pad(following.flatten()[answers], (0, missing), value=-100)[None]
    for name in ("point_clouds", "group_indices"):
        if name in samples[0]:
            batch[name] = torch.cat([samples[index][name] for row in rows for index in row])
    if packing.point_token_id is not None:
        is_point = (input_ids == packing.point_token_id) & (sample_ids >= 0)
        for index, sample in enumerate(samples):
            count, needed = (
                int(is_point[sample_ids == index].sum()),
                len(sample["point_clouds"]) * packing.num_query_tokens,
            )
            if count != needed:
                raise ValueError(
                    f"a sample has {count} point placeholders, but its {len(sample['point_clouds'])} point clouds need "
                    f"{needed}. MiniGPT3DProcessor writes the right number of them."
                )
        batch["point_positions"] = is_point.flatten().nonzero().flatten()
    if packing.masked:
        same = sample_ids[:, None, :, None] == sample_ids[:, None, None]  # (R, 1, T, T)
        batch["attention_mask"] = same.tril_()
    if packing.one_row:
        ends = torch.tensor([*ends, width] if ends[-1] < width else ends, dtype=torch.int32)
        longest = int(ends.diff().max())
        batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return batch


def _round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


def pad_batch(samples: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """The batch as the authors build it: one row per sample, padded on the right to the longest."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [sample["input_ids"] for sample in samples]
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad([sample["labels"] for sample in samples], batch_first=True, padding_value=-100),
        "point_clouds": torch.cat([sample["point_clouds"] for sample in samples]),
    }
