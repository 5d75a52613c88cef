"""What every request must pass: key, number, size, time; and what ends with the client's departure."""

import asyncio
import contextlib
import hmac
import time
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics
from .protocol import END_OF_STREAM, event
from .serve_options import LOCAL_HOSTS, ServeOptions


CHAT = "/v1/chat/completions"
CLIENT_LEFT = 499  # as nginx records it


class Guard:
    """ASGI middleware before the routes."""

    def __init__(self, app: ASGIApp, options: ServeOptions, metrics: Metrics):
        self._app, self._options, self._metrics = app, options, metrics
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        is_chat = scope["path"] == CHAT and scope["method"] == "POST"
        try:
            self._check(scope, is_chat)
            app = self._visit if is_chat else self._app
        except ApiError as error:
            app = JSONResponse(error.body, error.status, headers=_headers(error))
        if not is_chat:
            return await app(scope, receive, send)
        start, status = time.perf_counter(), CLIENT_LEFT

        async def recorded_send(message: Message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await app(scope, receive, recorded_send)
        except Exception:
            status = 500
            raise
        finally:
            self._metrics.requests.labels(status).inc()
            self._metrics.seconds.observe(time.perf_counter() - start)

    async def _visit(self, scope: Scope, receive: Receive, send: Send):
        self._num_requests += 1
        self._metrics.in_progress.set(self._num_requests)
        try:
            await _Visit(self._options, receive, send).run(self._app, scope)
        finally:
            self._num_requests -= 1
            self._metrics.in_progress.set(self._num_requests)

    def _check(self, scope: Scope, is_chat: bool):
        headers, key = dict(scope["headers"]), self._options.key
        if key is not None and scope["path"].startswith("/v1/"):
            if not hmac.compare_digest(headers.get(b"authorization", b""), f"Bearer {key}".encode()):
                raise ApiError(401, "This server needs its key: Authorization: Bearer KEY.", code="invalid_api_key")
        if key is None and self._options.is_local and not _is_local(headers.get(b"host", b"")):
            raise ApiError(421, f"This server answers as one of {', '.join(LOCAL_HOSTS)} only, unless it has a key.")
        if not is_chat:
            return
        if self._num_requests >= self._options.max_requests:
            raise ApiError(
                429,
                f"{self._num_requests} requests are in progress, as many as are allowed. Send this one again later.",
                code="rate_limit_exceeded",
            )
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._options.max_body_bytes:
            raise too_large(self._options, int(length))


def _is_local(host: bytes) -> bool:
    """Whether a request was made for this machine. Any web page may let its own host name lead here, and then read answers."""
    try:
        return urlsplit(f"//{host.decode('ascii')}").hostname in LOCAL_HOSTS
    except ValueError:
        return False


def too_large(options: ServeOptions, size: int) -> ApiError:
    return ApiError(
        413,
        f"The request has {size:,} bytes or more; at most {options.max_body_bytes:,} are allowed.",
        code="too_large",
    )


def _headers(error: ApiError) -> dict[str, str]:
    return {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status, {})


class _Visit:
    """One request for a chat completion, with limits of size and time; it is cancelled when its client leaves."""

    def __init__(self, options: ServeOptions, receive: Receive, send: Send):
        self._options, self._receive, self._send = options, receive, send
        self._size, self._is_received, self._is_begun = 0, asyncio.Event(), False
        self._is_stream = False

    async def run(self, app: ASGIApp, scope: Scope):
        work = asyncio.ensure_future(app(scope, self._limited_receive, self._noted_send))
        departure = asyncio.ensure_future(self._wait_for_departure())
        try:
            await asyncio.wait((work, departure), timeout=self._options.timeout, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            is_late = not departure.done()
        finally:
            for task in (work, departure):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await departure
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await work
        if is_late:
            await self._say_late(scope)

    async def _limited_receive(self) -> Message:
        if self._is_received.is_set():  # whoever waits for the departure is cancelled with the work
            await asyncio.Event().wait()
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if self._size > self._options.max_body_bytes:
            raise too_large(self._options, self._size)
        if not message.get("more_body", False):
            self._is_received.set()
        return message

    async def _noted_send(self, message: Message):
        if message["type"] == "http.response.start":
            self._is_begun = True
            self._is_stream = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
        await self._send(message)

    async def _wait_for_departure(self):
        await self._is_received.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _say_late(self, scope: Scope):
        error = ApiError(
            504, f"The request took more than the {self._options.timeout:g} seconds allowed.", code="timeout"
        )
        if not self._is_begun:
            await JSONResponse(error.body, error.status)(scope, self._receive, self._send)
        elif self._is_stream:
            body = event(error.body) + END_OF_STREAM
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
