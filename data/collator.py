"""Rows of a data set as batches, for `transformers.Trainer` and trl's `SFTTrainer`."""

from typing import Any

import numpy as np
from transformers import BatchFeature

from minigpt3d.processing_minigpt3d import IGNORED_LABEL, MiniGPT3DProcessor

from .clouds import decode_cloud
from .records import to_messages, to_sample


class MiniGPT3DCollator:
    """Turns rows into a batch with labels. Pass `remove_unused_columns=False` to the trainer, which would drop the columns.

    A row is one of

        {"messages": [{"role": "user", "content": [{"type": "point_cloud", "point_cloud": SOURCE}, {"type": "text", …}]}, …]}
        {"messages": …, "point_clouds": [SOURCE, …]}      sources in the order in which the messages show them
        a row of `minigpt3d pack`                          object_id, coord, color, conversations

    A source is whatever `load_point_cloud` reads.

    Args:
        processor: of the model.
        assistant_only_loss: learn the answers and what ends them; False: all text but the clouds' placeholders.
        max_text_length: tokens kept after the first prompt; the rest is cut off.
    """

    def __init__(
        self, processor: MiniGPT3DProcessor, assistant_only_loss: bool = True, max_text_length: int | None = None
    ):
        self.processor, self.assistant_only_loss = processor, assistant_only_loss
        self.max_text_length = max_text_length

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """B rows → `input_ids`, `attention_mask` and `labels` (B, T), padded on the right, and `point_clouds` (C, N, 6).

        Raises:
            ValueError: a row is of none of these kinds, or its messages show more or fewer clouds than it has.
        """
        read = [_read_packed(row) if "coord" in row else _read_messages(row) for row in rows]
        conversations = [messages for messages, _ in read]
        # A data set gives an array as lists of numbers, which the processor would take for lists of sources.
        clouds = [
            np.asarray(cloud, np.float32) if isinstance(cloud, list) else cloud
            for _, clouds in read
            for cloud in clouds
        ]
        batch = self.processor.encode_training(conversations, clouds, self.max_text_length)
        if not self.assistant_only_loss:
            ids = batch["input_ids"]
            is_text = batch["attention_mask"].bool() & (ids != self.processor.point_token_id)
            batch["labels"] = ids.where(is_text, IGNORED_LABEL)
        return batch


def _read_packed(row: dict) -> tuple[list[dict], list]:
    kind = "single_round" if len(row["conversations"]) == 2 else "multi_round"
    _, sample = to_sample(row | {"conversation_type": kind}, "packed data")
    return to_messages(sample), [decode_cloud(row["coord"], row["color"])]


def _read_messages(row: dict) -> tuple[list[dict], list]:
    if not isinstance(row.get("messages"), (list, tuple)):
        raise ValueError(
            f"A row must have 'messages', or be one of `minigpt3d pack`; got the columns {', '.join(sorted(row)) or 'none'}. "
            "Pass remove_unused_columns=False to the trainer, which drops columns otherwise."
        )
    given = list(row.get("point_clouds") or [])
    shown = [
        item.get("point_cloud")
        for message in row["messages"]
        if not isinstance(message["content"], str)
        for item in message["content"]
        if item["type"] == "point_cloud"
    ]
    if given and len(given) != len(shown):
        raise ValueError(f"The messages show {len(shown)} point clouds, but 'point_clouds' has {len(given)}.")
    return row["messages"], given or [source for source in shown if source is not None]


__all__ = ["MiniGPT3DCollator"]
