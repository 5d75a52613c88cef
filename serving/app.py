"""The routes of a server."""

import asyncio
import contextlib
import logging
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from minigpt3d.messages import one_line

from .conversation import make_conversation, save
from .engine import Engine
from .errors import ApiError
from .generation import Answer
from .guard import CHAT, CLIENT_LEFT, Guard
from .metrics import Metrics
from .protocol import END_OF_STREAM, Completion, count_tokens, event, parse_request
from .serve_options import ServeOptions


# Files of a multipart form: an object with its materials and textures, or several.
MOST_FILES = 64


def make_app(engine: Engine, model: str, options: ServeOptions, metrics: Metrics) -> FastAPI:
    """The ASGI application.

    Args:
        model: the name of the model.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        app.state.work = asyncio.create_task(engine.run())
        yield
        app.state.work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await app.state.work

    # OpenAI's schema is known; the pages that would show it load their code from another host.
    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_middleware(Guard, options=options, metrics=metrics)
    entry = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "minigpt3d"}

    add_error_handlers(app)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def show_health():
        is_well = not app.state.work.done()
        return JSONResponse({"status": "ok" if is_well else "failed", "model": model}, 200 if is_well else 503)

    @app.get("/metrics")
    async def show_metrics():
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/v1/models")
    async def list_models():
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str):
        check_model(name)
        return entry

    @app.post(CHAT)
    async def complete_chat(http_request: Request):
        with tempfile.TemporaryDirectory(prefix="minigpt3d-", ignore_cleanup_errors=True) as name:
            body, attachments = await read_body(http_request, Path(name), options.max_body_bytes)
            request = await asyncio.to_thread(parse_request, body)
            del body
            check_model(request.model)
            chat = await asyncio.to_thread(make_conversation, request, attachments, Path(name), options.root)
            request.messages.clear()  # what they held is in files now
            ids = await asyncio.to_thread(engine.encode, chat)
            clouds, warnings = await engine.read(chat.sources)
        answer = Answer(ids, clouds, engine.decoding(request, len(ids)))
        completion = Completion(model, warnings)
        if request.stream:
            with_usage = request.stream_options is not None and bool(request.stream_options.include_usage)
            events = stream(engine, answer, completion, with_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        try:
            text = await engine.batcher.complete(answer)
        except Exception as error:
            raise no_answer(error) from error
        return JSONResponse(completion.whole(text, answer.finish_reason, usage(answer)))

    def check_model(name: str | None):
        if name not in (None, model):
            message = f"There is no model {name[:80]!r}; this server has {model!r}."
            raise ApiError(404, message, "model", "model_not_found")

    return app


def add_error_handlers(app: FastAPI):
    """Give every error OpenAI's form."""

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError):
        return JSONResponse(error.body, error.status)

    @app.exception_handler(ClientDisconnect)
    async def on_departure(request: Request, error: ClientDisconnect):
        return Response(status_code=CLIENT_LEFT)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException):
        body = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").body
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def on_other_error(request: Request, error: Exception):
        return JSONResponse(ApiError(500, "The server failed; its log says why.").body, 500)


async def stream(engine: Engine, answer: Answer, completion: Completion, with_usage: bool) -> AsyncIterator[bytes]:
    """The events of an answer while it is generated."""
    yield completion.chunk({"role": "assistant", "content": ""}, warnings=completion.warnings)
    shown = 0
    try:
        async with contextlib.aclosing(engine.batcher.follow(answer)) as texts:
            async for text in texts:
                if len(text) > shown:
                    yield completion.chunk({"content": text[shown:]})
                    shown = len(text)
    except Exception as error:
        yield event(no_answer(error).body)
    else:
        yield completion.chunk({}, answer.finish_reason)
        if with_usage:
            yield completion.usage_chunk(usage(answer))
    yield END_OF_STREAM


def usage(answer: Answer) -> dict:
    """The tokens of a question and its answer."""
    return count_tokens(len(answer.input_ids), answer.num_tokens)


def no_answer(error: Exception) -> ApiError:
    """What the client gets if the model fails; the log gets the rest."""
    logging.getLogger("uvicorn.error").error("no answer", exc_info=error)
    return ApiError(500, f"The model gave no answer: {one_line(error)}")


async def read_body(request: Request, folder: Path, max_bytes: int) -> tuple[bytes, dict[str, Path]]:
    """The JSON of a request, and the files of a multipart form, which are written to a folder.

    Raises:
        ApiError: it is of another type, or the form has no part `request`.
    """
    if (encoding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise ApiError(415, f"The encoding {encoding[:80]} is not read. Send the request as it is.")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return await request.body(), {}
    if kind != "multipart/form-data":
        raise ApiError(415, f"Expected application/json or multipart/form-data, got {kind[:80] or 'no type'}.")
    files, body = {}, None
    try:
        form = await request.form(max_files=MOST_FILES, max_fields=1, max_part_size=max_bytes)
    except ValueError as error:  # of python-multipart; Starlette passes some on
        raise ApiError(400, f"The form cannot be read: {one_line(error)}") from error
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile) and name == "file":
                path = await asyncio.to_thread(save, value.file, value.filename or "", folder / "form", "file")
                files[value.filename] = path
            elif name == "request":
                body = await value.read() if isinstance(value, UploadFile) else value.encode()
            else:
                raise ApiError(
                    400, f"Expected the parts `request`, with JSON, and `file`, got {name[:80]!r}.", name[:80]
                )
    finally:
        await request.close()
    if body is None:
        raise ApiError(400, "The form has no part `request` with the JSON of the request.", "request")
    return body, files
