"""From the body of a request to the messages of a chat and the files of its clouds.

A cloud is in the request (`data:` or `attachment:`, a file of a multipart form), behind an `https://` URL, or in the folder that
the server shows its clients.
"""

import base64
import binascii
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from minigpt3d.point_cloud_minigpt3d import is_readable
from minigpt3d.processing_minigpt3d import DEFAULT_PROMPT
from minigpt3d.readers_minigpt3d import printable
from minigpt3d.sources_minigpt3d import sniff_suffix, source_name

from .errors import INVALID, ApiError
from .protocol import ChatRequest, PointCloudUrl


# Clouds of a conversation; each may take the seconds of a file.
MOST_CLOUDS = 32
EXPECTED = (
    "Expected data:[;name=FILE];base64,…, https://…, attachment:NAME of a multipart form, or a file of the server"
)


@dataclass(frozen=True)
class Source:
    """A cloud that is to be read.

    Args:
        path: of a file, or an `https://` URL.
        name: what messages call it.
        param: where the request names it.
        reading: `up_axis`, `missing_color` and `clean`, as far as they are given.
    """

    path: Path | str
    name: str
    param: str
    reading: dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """A conversation whose last message is a question.

    Args:
        messages: for the processor; they show the places of the clouds.
        sources: of the clouds, in order.
    """

    messages: list[dict[str, Any]]
    sources: list[Source]


def make_conversation(
    request: ChatRequest, attachments: dict[str, Path], folder: Path, root: Path | None
) -> Conversation:
    """
    Args:
        attachments: the files of a multipart form by name. If no message refers to one, those that hold clouds are shown
            before the first question.
        folder: where the content of `data:` URLs is written.
        root: the folder whose files clients may name.

    Raises:
        ApiError: a cloud is not where the request says.
    """
    messages, sources = [], []
    for number, message in enumerate(request.messages):
        content = []
        for place, part in enumerate(message.content):
            if part.type == "text":
                content.append({"type": "text", "text": part.text})
                continue
            param = f"messages[{number}].content[{place}].point_cloud_url"
            if message.role != "user":
                raise ApiError(400, f"Clouds are shown by the user, got the role {message.role[:40]!r}.", param)
            sources.append(_find(part.point_cloud_url, param, attachments, folder / f"{number}-{place}", root))
            content.append({"type": "point_cloud"})
        role = "system" if message.role == "developer" else message.role  # OpenAI's newer name
        messages.append({"role": role, "content": content})
    if attachments and not any(source.path in attachments.values() for source in sources):
        shown = _show(attachments)
        sources[:0] = shown
        first = next(message for message in messages if message["role"] == "user")
        first["content"][:0] = [{"type": "point_cloud"}] * len(shown)
    if len(sources) > MOST_CLOUDS:
        raise ApiError(400, f"The messages show {len(sources)} clouds; at most {MOST_CLOUDS} are allowed.", "messages")
    question = messages[-1]["content"]
    question[:] = [part for part in question if part["type"] != "text" or part["text"].strip()]
    if not any(part["type"] == "text" for part in question):
        if not sources:
            raise ApiError(400, "The question is empty.", f"messages[{len(messages) - 1}].content")
        question.append({"type": "text", "text": DEFAULT_PROMPT})
    return Conversation(messages, sources)


def _show(attachments: dict[str, Path]) -> list[Source]:
    """The attachments that are clouds; the others are materials and textures of these."""
    shown = [Source(path, name, "file", {}) for name, path in attachments.items() if is_readable(path)]
    if not shown:
        names = ", ".join(map(printable, attachments))
        raise ApiError(400, f"None of the files is of a type that is read: {names:.200}.", "file")
    return shown


def _find(part: PointCloudUrl, param: str, attachments: dict[str, Path], folder: Path, root: Path | None) -> Source:
    url, reading = part.url, part.model_dump(include={"up_axis", "missing_color", "clean"}, exclude_none=True)
    scheme = re.match(r"([A-Za-z][\w+.-]+):", url)
    scheme = scheme[1].lower() if scheme else "file"
    if scheme == "https" and url[6:8] == "//":
        return Source(url, source_name(url), param, reading)
    if scheme == "data":
        name, content = _decode(url, param)
        path = save(content, name or "cloud", folder, param)
        return Source(path, name or "the point cloud", param, reading)
    if scheme == "attachment":
        name = url.partition(":")[2]
        if name not in attachments:
            known = ", ".join(map(printable, attachments)) or "none"
            raise ApiError(400, f"There is no file {printable(name)[:80]!r} in the form; it has {known:.200}.", param)
        return Source(attachments[name], name, param, reading)
    if scheme == "file":
        return Source(_below(root, url, param), source_name(url), param, reading)
    raise ApiError(400, f"{printable(url)[:40]!r} is no URL of a point cloud. {EXPECTED}.", param)


def _decode(url: str, param: str) -> tuple[str, bytes]:
    """Name, which may be empty, and content of a `data:` URL (RFC 2397)."""
    header, comma, data = url.partition(",")
    if not comma:
        raise ApiError(400, f"This data: URL has no comma before its content. {EXPECTED}.", param, INVALID)
    parameters = [word.strip() for word in header.split(";")[1:]]
    names = [unquote(word[5:]) for word in parameters if word.lower().startswith("name=")]
    try:
        is_base64 = "base64" in (word.lower() for word in parameters)
        content = base64.b64decode(unquote_to_bytes(data), validate=True) if is_base64 else unquote_to_bytes(data)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"The content of this data: URL is no base64: {error}.", param, INVALID) from error
    return (names[0] if names else ""), content


def save(content: bytes | BinaryIO, name: str, folder: Path, param: str) -> Path:
    """Write a file under its name, with a suffix that fits the content if it has none.

    Raises:
        ApiError: it is empty, its name is none, or its type cannot be told.
    """
    base = PurePosixPath(name.replace("\\", "/")).name
    try:
        is_name = base not in ("", "..") and "\0" not in base and len(base.encode()) <= 200
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise ApiError(400, f"{printable(name)[:80]!r} cannot be the name of a file.", param)
    folder.mkdir(exist_ok=True)
    path = folder / base
    try:
        with open(path, "xb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                shutil.copyfileobj(content, file)
    except FileExistsError as error:
        raise ApiError(400, f"Two files have the name {printable(base)}. Rename one.", param) from error
    if not path.stat().st_size:
        raise ApiError(400, f"{printable(base)} is empty (0 bytes).", param, INVALID)
    if path.suffix:
        return path
    suffix = sniff_suffix(path)
    if suffix is None:
        raise ApiError(
            400,
            f"The format of {printable(base)} cannot be told from its content. Give it a name: data:;name=chair.ply;base64,…",
            param,
            INVALID,
        )
    return path.rename(path.with_name(path.name + suffix))


def _below(root: Path | None, url: str, param: str) -> Path:
    """A file in the folder that clients may name files of; links that lead out of it are refused."""
    if root is None:
        raise ApiError(400, f"This server shows no files of its own. {EXPECTED.rpartition(',')[0]}.", param)
    text = url
    if url.lower().startswith("file:"):
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise ApiError(400, "A file: URL names no host. Expected file:///PATH, or a path.", param)
        text = url2pathname(parts.path)
    root = root.resolve()
    try:
        path = (root / text).resolve()
        is_file = path.is_relative_to(root) and path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, a circle of links
        is_file = False
    if not is_file:
        raise ApiError(404, f"{source_name(text)[:200]}: there is no such file in the server's folder.", param)
    return path
