"""A model with its readers: from a chat to its answer."""

import asyncio
import os
from dataclasses import dataclass

import numpy as np

from minigpt3d.data.reading import FileReader, Limits
from minigpt3d.point_cloud_minigpt3d import load_orientations
from minigpt3d.readers_minigpt3d import printable
from minigpt3d.sources_minigpt3d import HOW_TO_ALLOW, source_name

from .batching import Batcher
from .conversation import Conversation, Source
from .errors import INVALID, ApiError
from .generation import Decoding, answer_batch
from .metrics import Metrics
from .protocol import ChatRequest
from .serve_options import ServeOptions


# Clouds that are read at the same time.
READERS = min(8, max(2, (os.cpu_count() or 1) // 2))
# The processor wants to see a cloud for each placeholder; the real ones are read elsewhere.
_PLACEHOLDER = np.eye(2, 6, dtype=np.float32)


@dataclass(frozen=True)
class Settings:
    """What a server does unless a request says otherwise.

    Args:
        reading: `up_axis`, `missing_color` and `clean`, as far as they are given.
        limits: of reading a file.
        max_new_tokens: of an answer, also the most that a request may ask for.
        batch_size: answers of a batch, at most.
    """

    reading: dict[str, str]
    limits: Limits
    max_new_tokens: int
    batch_size: int


class Engine:
    """
    Args:
        pipeline: a `PointCloudToTextPipeline`.
        options: of the server.
    """

    def __init__(self, pipeline, settings: Settings, options: ServeOptions, metrics: Metrics):
        self._pipeline, self._processor, self._settings = pipeline, pipeline.processor, settings
        self._options, self._metrics = options, metrics
        limits = settings.limits._replace(
            max_download_bytes=options.max_body_bytes, max_download_seconds=options.timeout
        )
        self._reader = FileReader(load_orientations, READERS, limits)
        self.batcher = Batcher(
            lambda answers, on_step: answer_batch(pipeline, answers, on_step),
            settings.batch_size,
            options.batch_wait / 1000,
            metrics.count_batch,
        )
        metrics.waiting.set_function(lambda: self.batcher.num_waiting)
        text_config = pipeline.model.config.get_text_config()
        positions = getattr(text_config, "max_position_embeddings", None) or np.inf
        self._context = int(min(self._processor.tokenizer.model_max_length, positions, 2**31))
        self._longest_token = max(map(len, self._processor.tokenizer.get_vocab()))

    async def run(self):
        """Answer until it is cancelled."""
        with self._reader:
            await self.batcher.run()

    async def read(self, sources: list[Source]) -> tuple[list[np.ndarray], list[str]]:
        """The clouds (P, 6) of a chat, y up, and the warnings about them.

        Raises:
            ApiError: one cannot be read.
        """
        if not sources:
            return [], ["no message shows a point cloud, so the answer is about none."]
        tasks = [asyncio.ensure_future(self._read(source)) for source in sources]
        try:
            results = await asyncio.gather(*tasks)
        finally:  # one failed, or the client left: the others need not be read
            for task in tasks:
                task.cancel()
        return [cloud for cloud, _ in results], [text for _, texts in results for text in texts]

    async def _read(self, source: Source) -> tuple[np.ndarray, list[str]]:
        arguments = self._pipeline.reading_arguments(**self._settings.reading | source.reading)
        result = await self._reader.read(source.path, **arguments)
        self._metrics.reading.observe(result.seconds)
        if result.error is not None:
            text = str(result.error).replace(HOW_TO_ALLOW, "Send the file with the request.")
            raise ApiError(400, _called(text, source), source.param, INVALID)
        orientations, _ = result.content
        if len(orientations) == 1:
            (chosen,) = orientations
        else:
            chosen = await self.batcher.call(self._pipeline.choose_orientation, orientations)
        return chosen.cloud, [_called(text, source) for text in (*result.warnings, *chosen.notes)]

    def encode(self, chat: Conversation) -> list[int]:
        """The tokens of a conversation, with the placeholders of its clouds.

        Raises:
            ApiError: the template does not take it, or it is longer than the model's context.
        """
        characters = sum(
            len(part["text"]) for message in chat.messages for part in message["content"] if part["type"] == "text"
        )
        # Before anything is done with texts that cannot fit.
        at_least = len(chat.messages) + len(chat.sources) * self._processor.num_query_tokens
        at_least += characters // self._longest_token
        if at_least >= self._context:
            raise self._too_long(f"at least {at_least:,}")
        clouds = [_PLACEHOLDER] * len(chat.sources)
        try:
            encoded = self._processor.apply_chat_template(
                chat.messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **({"point_clouds": clouds, "up_axis": "y", "clean": "none"} if clouds else {}),
                max_length=2**31,  # what is too long is refused below
            )
        except Exception as error:  # of jinja, which has a class of its own
            reason = " ".join(str(error).split())
            raise ApiError(
                400, f"The model's chat template does not take these messages: {reason}", "messages"
            ) from error
        (ids,) = np.asarray(encoded["input_ids"]).reshape(1, -1).tolist()
        if len(ids) >= self._context:
            raise self._too_long(f"{len(ids):,}")
        return ids

    def _too_long(self, length: str) -> ApiError:
        return ApiError(
            400,
            f"The conversation has {length} tokens, {self._processor.num_query_tokens} for each cloud, but the model's context is "
            f"{self._context:,} with the answer. Leave out its beginning, or clouds.",
            "messages",
            "context_length_exceeded",
        )

    def decoding(self, request: ChatRequest, prompt_length: int) -> Decoding:
        """How a request wants its answer: greedy, unless it gives a temperature or `top_p`."""
        limits = (request.max_completion_tokens, request.max_tokens, self._settings.max_new_tokens)
        most = min(limit for limit in (*limits, self._context - prompt_length) if limit is not None)
        temperature = request.temperature
        if temperature is None:
            temperature = 0.0 if request.top_p is None else 1.0
        top_p = 1.0 if request.top_p is None else request.top_p
        return Decoding(most, temperature, top_p, request.seed, tuple(request.stop))


def _called(text: str, source: Source) -> str:
    """A message in which a source has its own name; that of its file says where the server keeps it."""
    for path in (source_name(source.path), printable(str(source.path)), str(source.path)):
        text = text.replace(path, printable(source.name))
    return " ".join(text.split())
