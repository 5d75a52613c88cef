"""Answer requests that arrive together in one batch.

The first one waits `wait` seconds for others, unless there are enough for a batch; what arrives while the model works is in the
next batch. The model works in a thread of its own, everything else is on the event loop.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from .generation import Answer


class Batcher:
    """A queue before the model.

    Args:
        answer: (answers, on_step) generates them, and calls `on_step` after every token.
        size: answers of a batch, at most.
        wait: seconds.
        on_batch: called with each batch when it is over.
    """

    def __init__(
        self,
        answer: Callable[[list[Answer], Callable[[], None]], None],
        size: int,
        wait: float,
        on_batch: Callable[[list[Answer]], None],
    ):
        self._answer, self._size, self._wait, self._on_batch = answer, size, wait, on_batch
        self._waiting: deque[Answer] = deque()
        self._has_any, self._is_full = asyncio.Event(), asyncio.Event()
        self._changed: dict[Answer, asyncio.Event] = {}
        self._thread = ThreadPoolExecutor(1, "model")

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def call(self, function: Callable, *arguments):
        """Call a function that uses the model, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def follow(self, answer: Answer) -> AsyncIterator[str]:
        """The text so far, again whenever it has grown; the last one is complete. Leaving ends the answer.

        Raises:
            Exception: the model failed.
        """
        changed = self._changed[answer] = asyncio.Event()
        self._waiting.append(answer)
        self._update()
        try:
            while True:
                await changed.wait()
                changed.clear()
                is_over = answer.is_over  # before its text, which may still grow
                if answer.error is not None:
                    raise answer.error
                yield answer.text
                if is_over:
                    return
        finally:
            answer.is_cancelled = True
            del self._changed[answer]
            if answer in self._waiting:
                self._waiting.remove(answer)
                self._update()

    async def complete(self, answer: Answer) -> str:
        """The complete text. Raises as `follow`."""
        text = ""
        async with contextlib.aclosing(self.follow(answer)) as texts:
            async for text in texts:  # noqa: B007
                pass
        return text

    def _update(self):
        for event, is_set in ((self._has_any, self._waiting), (self._is_full, len(self._waiting) >= self._size)):
            if is_set:
                event.set()
            else:
                event.clear()

    async def run(self):
        """Answer batch after batch, until it is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._has_any.wait()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._is_full.wait(), self._wait)
                batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
                self._update()
                if batch:  # they may all have left
                    await loop.run_in_executor(self._thread, self._answer_all, batch, loop)
                    self._on_batch(batch)
        finally:
            for answer in list(self._changed):
                answer.is_cancelled = True
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _answer_all(self, batch: list[Answer], loop: asyncio.AbstractEventLoop):
        """In the thread of the model. Out of memory, for example: an answer alone may succeed."""
        try:
            self._answer(batch, lambda: loop.call_soon_threadsafe(self._tell, batch))
        except Exception as error:
            if len(batch) == 1:
                batch[0].error = error
            else:
                for answer in batch:
                    if not answer.is_over:
                        self._answer_all([answer], loop)
        loop.call_soon_threadsafe(self._tell, batch)

    def _tell(self, batch: list[Answer]):
        for answer in batch:
            if answer in self._changed:
                self._changed[answer].set()
