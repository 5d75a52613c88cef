"""The chat completions of OpenAI's API: requests, answers, chunks of a stream.

Beyond OpenAI's, a message holds parts of type `point_cloud_url`, and an answer holds the `warnings` about its clouds.
"""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator

from .errors import ApiError


# Arguments that change no answer here.
IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Values that ask for what is done anyway, beside None, False and empty ones.
NEUTRAL = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "top_logprobs": 0,
    "modalities": ["text"],
    "response_format": {"type": "text"},
    "tool_choice": "none",
}
# What may be one text or a list, and of what.
TEXTS = {"content": "parts", "stop": "texts"}
MOST_STOPS = 4  # as OpenAI allows
MOST_ITEMS = 1000  # messages, and parts of each


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class PointCloudUrl(_Strict):
    """Where an object is, and how it is read; what is not given is the server's setting."""

    url: str = Field(min_length=1)
    up_axis: Literal["x", "y", "z", "auto"] | None = None
    missing_color: Literal["black", "gray", "white"] | None = None
    clean: Literal["none", "outliers", "floor", "all"] | None = None


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class PointCloudPart(_Strict):
    type: Literal["point_cloud_url"]
    point_cloud_url: PointCloudUrl


class Message(BaseModel):
    """A turn. Clients send answers back with empty fields of OpenAI's, which are not looked at."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: Annotated[
        list[Annotated[TextPart | PointCloudPart, Field(discriminator="type")]],
        FailFast(),
        Field(max_length=MOST_ITEMS),
    ]

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MOST_ITEMS)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], FailFast(), Field(max_length=MOST_STOPS)] = []

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [] if stop is None else [stop] if isinstance(stop, str) else stop


def parse_request(body: bytes) -> ChatRequest:
    """
    Raises:
        ApiError: it is no JSON, or no request that can be answered.
    """
    try:
        request = ChatRequest.model_validate_json(body.removeprefix(b"\xef\xbb\xbf"))
    except ValidationError as error:
        raise _as_api_error(error.errors(include_url=False, include_context=False)[0]) from error
    _check_extras(request.model_extra, "")
    for number, message in enumerate(request.messages):
        _check_extras(message.model_extra, f"messages[{number}].")
    if request.messages[-1].role != "user":
        raise ApiError(
            400,
            f"The last message must be a question with the role 'user', got {request.messages[-1].role[:40]!r}.",
            f"messages[{len(request.messages) - 1}].role",
        )
    return request


def _check_extras(extras: dict[str, Any], where: str):
    for name, value in extras.items():
        is_neutral = not value or value == NEUTRAL.get(name) or name in (IGNORED if not where else {"name"})
        if not is_neutral:
            raise ApiError(
                400, f"{name[:80]} is not supported. Leave it out.", where + name[:80], "unsupported_parameter"
            )


def _as_api_error(error: dict) -> ApiError:
    param, previous = "", None
    for place in error["loc"]:
        if isinstance(place, int):
            param += f"[{place}]"
        elif not (isinstance(previous, int) and place in ("text", "point_cloud_url")):  # which kind of part it is
            param += f".{place}" if param else str(place)
        previous = place
    if error["type"] == "union_tag_not_found":
        error["msg"] = "A part needs a type, 'text' or 'point_cloud_url'"
    elif error["type"] == "union_tag_invalid":
        error["msg"] = "A part of another type than 'text' or 'point_cloud_url' is not read"
        error["input"] = error["input"]["type"]
    elif error["type"] == "list_type" and previous in TEXTS:
        error["msg"] = f"Expected a text or a list of {TEXTS[previous]}"
    value = error["input"]
    got = f", got {json.dumps(value):.80}" if isinstance(value, (str, int, float, bool, type(None))) and param else ""
    return ApiError(400, f"{param or 'The request'}: {error['msg']}{got}.", param or None)


@dataclass(frozen=True)
class Completion:
    """What is the same in all parts of an answer.

    Args:
        model: its name.
        warnings: about the clouds.
    """

    model: str
    warnings: list[str]
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _json(self, kind: str, choices: list[dict], **more) -> dict:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    def whole(self, text: str, finish_reason: str, usage: dict) -> dict:
        """The body of an answer that is not streamed."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return self._json("chat.completion", [choice], usage=usage, warnings=self.warnings)

    def chunk(self, delta: dict, finish_reason: str | None = None, **more) -> bytes:
        """An event of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event(self._json("chat.completion.chunk", [choice], **more))

    def usage_chunk(self, usage: dict) -> bytes:
        """The event that ends a stream if the client asks for it."""
        return event(self._json("chat.completion.chunk", [], usage=usage))


def count_tokens(prompt: int, completion: int) -> dict:
    """The `usage` of an answer."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


END_OF_STREAM = b"data: [DONE]\n\n"


def event(content: dict) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
