"""Streamed answers about an object."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import TextIteratorStreamer


class Stop(StoppingCriteria):
    """Ends an answer after the current token once `asked` is true."""

    def __init__(self):
        self.asked = False

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked, dtype=torch.bool, device=input_ids.device)  # (B,)


class Answerer:
    """Asks a model, for one person at a time.

    Args:
        pipeline: `PointCloudToTextPipeline`.
        lock: held while the model computes.
        max_new_tokens: of an answer.
    """

    def __init__(self, pipeline, lock: threading.Lock, max_new_tokens: int):
        self._pipeline, self._lock, self._max_new_tokens = pipeline, lock, max_new_tokens

    def stream(
        self, cloud: np.ndarray, turns: list[tuple[str, str]], question: str, stop: Stop, sample: bool = False
    ) -> Iterator[str]:
        """The answer to a question, longer and longer.

        Args:
            cloud: (P, 6), y up.
            turns: questions and answers before; the first ones are left out if the context is too short for all.
            question: not empty.
            stop: ends the answer early.
            sample: draw the answer at random, for another one than before; else it is greedy.

        Raises:
            ValueError: the context is too short for the question.
        """
        kept = list(turns)
        while True:
            try:
                yield from self._stream(to_messages(cloud, kept, question), stop, sample)
                return
            except ValueError as error:
                if not (kept and "the context has" in str(error)):
                    raise
                kept = kept[len(kept) // 2 + 1 :]

    def _stream(self, messages: list[dict], stop: Stop, sample: bool) -> Iterator[str]:
        processor = self._pipeline.processor
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def generate():
            try:
                with self._lock:
                    self._pipeline(
                        messages,
                        up_axis="y",
                        clean="none",
                        max_new_tokens=self._max_new_tokens,
                        do_sample=sample,
                        streamer=streamer,
                        stopping_criteria=[stop],
                    )
            finally:
                streamer.end()

        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(generate)
            text = ""
            try:
                for piece in streamer:
                    text += piece
                    yield text.split(processor.end_of_answer)[0].strip()
            finally:
                stop.asked = True  # nobody reads on
            running.result()


def to_messages(cloud: np.ndarray, turns: list[tuple[str, str]], question: str) -> list[dict]:
    """A chat whose first question shows the cloud, and whose last one has no answer yet."""
    messages = []
    for asked, answer in turns:
        messages += [_message("user", asked), _message("assistant", answer)]
    messages.append(_message("user", question))
    messages[0]["content"].insert(0, {"type": "point_cloud", "point_cloud": cloud})
    return messages


def _message(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}
