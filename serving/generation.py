"""One batch of questions on the model, each with its own length, sampling, stops and departure.

`generate` decodes greedily. What a question asks for beyond that is a matter of its row: a logits processor replaces the scores
of a row that is sampled by ones whose largest is the sample, and a stopping criterion ends each row for itself.

Shapes: B rows, T tokens, V vocabulary, C clouds, P points.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Decoding:
    """How an answer is chosen.

    Args:
        max_new_tokens: of the answer.
        temperature: 0 for the most likely token.
        top_p: share of the likeliest tokens that are sampled from.
        seed: of the sampling; None for another answer each time.
        stops: texts that end the answer, beside the model's own.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()


class Answer:
    """The answer to one question while it grows.

    Args:
        input_ids: T tokens of the conversation, with the placeholders of its clouds.
        clouds: (P, 6) each.
        decoding: how it is chosen.
    """

    def __init__(self, input_ids: list[int], clouds: list[np.ndarray], decoding: Decoding):
        self.input_ids, self.clouds, self.decoding = input_ids, clouds, decoding
        self.is_cancelled = False
        self.error: Exception | None = None
        self.finish_reason: str | None = None  # "stop" or "length"
        self.num_tokens = 0
        self._text = ""

    @property
    def is_over(self) -> bool:
        return self.is_cancelled or self.finish_reason is not None or self.error is not None

    def begin(self, tokenizer, stops: list[str], ends: set[int]):
        """Begin, or begin again after a failure: the text becomes the same, so what has been shown stays right.

        Args:
            stops: texts that end every answer of the model.
            ends: tokens that do.
        """
        self.num_tokens, self._text = 0, ""
        self._tokenizer, self._ends = tokenizer.backend_tokenizer, ends
        self._stops = [*stops, *self.decoding.stops]
        self._decoder = DecodeStream(skip_special_tokens=True)
        if self.decoding.temperature:
            warpers = [TemperatureLogitsWarper(self.decoding.temperature)]
            warpers += [TopPLogitsWarper(self.decoding.top_p)] if self.decoding.top_p < 1 else []
            self._warpers, self._random = LogitsProcessorList(warpers), torch.Generator()
            if self.decoding.seed is None:
                self.decoding = replace(self.decoding, seed=self._random.seed() >> 1)
            self._random.manual_seed(self.decoding.seed)

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (V,) → scores whose largest is the chosen token, a sample if the temperature is above 0."""
        scores = scores.float()
        if not self.decoding.temperature:
            return scores
        probabilities = self._warpers(None, scores[None])[0].softmax(-1)
        # The largest of p / e, with e exponentially distributed, is a token with probability p.
        noise = torch.empty(len(scores)).exponential_(generator=self._random).clamp_min_(1e-30)
        return probabilities / noise.to(scores.device)

    def add(self, token: int):
        """Append a token that was chosen."""
        self.num_tokens += 1
        self._text += self._decoder.step(self._tokenizer, token) or ""
        places = [place for stop in self._stops if (place := self._text.find(stop)) >= 0]
        if places:
            self._text = self._text[: min(places)]
        if places or token in self._ends:
            self.finish_reason = "stop"
        elif self.num_tokens >= self.decoding.max_new_tokens:
            self.finish_reason = "length"

    @property
    def text(self) -> str:
        """The text so far, without white space at its ends, and without what may become a stop."""
        is_finished = self.finish_reason is not None  # read first: the text may grow meanwhile
        text = self._text.lstrip()
        if not is_finished:
            lengths = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
            text = text[: len(text) - max(lengths, default=0)]
        return text.rstrip()


class _Choose(LogitsProcessor):
    def __init__(self, answers: list[Answer]):
        self.answers = answers

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, T), (B, V) → (B, V)."""
        if not any(answer.decoding.temperature for answer in self.answers):
            return scores
        return torch.stack([answer.choose(row) for answer, row in zip(self.answers, scores, strict=True)])


class _Append(StoppingCriteria):
    def __init__(self, answers: list[Answer], on_step: Callable[[], None]):
        self.answers, self.on_step = answers, on_step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """(B, T) → whether each row is over, (B,) bool."""
        for answer, token in zip(self.answers, input_ids[:, -1].tolist(), strict=True):
            if not answer.is_over:
                answer.add(token)
        self.on_step()
        return torch.tensor([answer.is_over for answer in self.answers], device=input_ids.device)


@torch.inference_mode()
def answer_batch(pipeline, answers: list[Answer], on_step: Callable[[], None]):
    """Generate B answers at once.

    Args:
        pipeline: a `PointCloudToTextPipeline`.
        on_step: called after every token.
    """
    model, processor = pipeline.model, pipeline.processor
    tokenizer, config = processor.tokenizer, model.generation_config
    stops = config.stop_strings or []
    stops = [*([stops] if isinstance(stops, str) else stops), processor.end_of_answer]
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for answer in answers:
        answer.begin(tokenizer, stops, {*ends, tokenizer.eos_token_id})
    ids = [answer.input_ids for answer in answers]
    inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    clouds = [cloud for answer in answers for cloud in answer.clouds]
    if clouds:
        inputs["point_clouds"] = torch.from_numpy(np.stack(clouds))
    model.generate(
        **inputs.to(model.device),
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        max_new_tokens=max(answer.decoding.max_new_tokens for answer in answers),
        logits_processor=LogitsProcessorList([_Choose(answers)]),
        stopping_criteria=StoppingCriteriaList([_Append(answers, on_step)]),
        tokenizer=tokenizer,
    )
