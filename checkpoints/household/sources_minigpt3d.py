"""Where a cloud comes from: paths, URLs, bytes, open files, rows of data sets, gzip; each becomes a regular file to read.

Downloads use https only. Every address that a name or a redirect leads to is checked before the connection is made to
that very address, so a link cannot reach into a private network. `MINIGPT3D_ALLOW_PRIVATE_URLS=1` allows it.
"""

import contextlib
import gzip
import http.client
import ipaddress
import os
import re
import socket
import ssl
import stat
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from .readers_minigpt3d import PointCloudError, check_unpacked_size, limits, packed_in, printable


ALLOW_PRIVATE_VARIABLE = "MINIGPT3D_ALLOW_PRIVATE_URLS"
HOW_TO_ALLOW = f"If you trust it, set {ALLOW_PRIVATE_VARIABLE}=1, or download the file and pass its path."
_BLOCK = 1 << 20
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_URL = re.compile(r"(?i)(https?|file|ftp|s3|gs|hf)://")


def source_name(source: Any) -> str:
    """What messages call a source: its path or URL, without control characters or a password."""
    if isinstance(source, (str, os.PathLike)):
        return printable(_without_secrets(source) if isinstance(source, str) else str(source)) or "the given path"
    if _is_row(source):
        return source_name(source["path"]) if source.get("path") else "the given row"
    name = getattr(source, "name", None)
    if hasattr(source, "read") and isinstance(name, str):
        return printable(name)
    return f"the given {type(source).__name__}"


def is_url(source: Any) -> bool:
    """Whether a source is a URL, of any scheme."""
    return isinstance(source, str) and _URL.match(source) is not None


def is_file_like(source: Any) -> bool:
    """Whether a source holds the content of a file, wherever it is."""
    return (
        isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview))
        or hasattr(source, "read")
        or _is_row(source)
    )


@contextlib.contextmanager
def local_file(source: Any) -> Iterator[Path]:
    """A regular file with the content of a source; what had to be written for it is removed afterwards.

    Args:
        source: a path, an `https://` or `file://` URL, bytes, a binary file open for reading, or `{"bytes", "path"}`.

    Raises:
        PointCloudError: there is no such file, it is too large, or its type cannot be told.
    """
    with contextlib.ExitStack() as stack:
        path = _find(source, stack)
        _check_regular(path)
        if path.suffix.lower() == ".gz":
            stack.enter_context(packed_in(path.parent))
            path = _unpack(path, stack)
        yield path


def _find(source: Any, stack: contextlib.ExitStack) -> Path:
    if _is_row(source):
        content, path = source.get("bytes"), source.get("path")
        if content is None and not path:
            raise PointCloudError("this row has neither bytes nor a path. Expected {'bytes': …, 'path': …}.")
        if content is None:
            return _find(path, stack)
        return _save(content, PurePosixPath(str(path or "")).name, stack)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _save(source, "", stack)
    if hasattr(source, "read"):
        name = getattr(source, "name", "")
        return _save(source, os.path.basename(name) if isinstance(name, str) else "", stack)
    text = os.fspath(source)
    if isinstance(source, str) and (match := _URL.match(text)):
        scheme = match[1].lower()
        if scheme == "https":
            return _download(text, stack)
        if scheme == "file":
            return _file_url(text)
        raise PointCloudError(
            f"{scheme}:// is not read. Pass an https:// URL, or download the file and pass its path."
        )
    if not text.strip():
        raise PointCloudError("a path cannot be empty.")
    if "\0" in text:
        raise PointCloudError("a path cannot hold a zero byte.")
    path = Path(text)
    return path.expanduser() if text.startswith("~") and not path.exists() else path


def _is_row(source: Any) -> bool:
    return isinstance(source, dict)


def _file_url(url: str) -> Path:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise PointCloudError(f"file://{parts.netloc}/ is on another machine. Pass file:///path, or a path.")
    return Path(urllib.request.url2pathname(parts.path))


def _check_regular(path: Path):
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PointCloudError("there is no such file. Check the path.") from error
    except OSError as error:
        raise PointCloudError(f"it cannot be opened: {error.strerror or error}.") from error
    if stat.S_ISDIR(mode):
        raise PointCloudError("this is a folder. Pass one of the files in it.")
    if not stat.S_ISREG(mode):
        raise PointCloudError("it is a pipe, socket or device, which may never end. Save it to a file first.")
    if not os.access(path, os.R_OK):
        raise PointCloudError("it cannot be opened: no permission to read it.")


# ---- Content --------------------------------------------------------------------------------------------------------


def _save(content: Any, name: str, stack: contextlib.ExitStack) -> Path:
    """Write bytes, or what is left in an open file, to a temporary file whose suffix says what it is."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    path = folder / (_safe_name(name) or "cloud")
    with open(path, "wb") as target:
        if hasattr(content, "read"):
            _copy(content, target, limits().max_unpacked_bytes)
        else:
            target.write(content)
    return path if path.suffix else _with_suffix(path)


def _safe_name(name: str) -> str:
    """The last part of a name, as it may be used in any folder."""
    return re.sub(r"[^\w.,+=@ -]", "_", name.replace("\\", "/").rpartition("/")[2])[-100:].lstrip(".")


def _copy(source: Any, target: BinaryIO, limit: int):
    size = 0
    while block := source.read(_BLOCK):
        if isinstance(block, str):
            raise PointCloudError("it is open as text. Open it in binary mode, open(path, 'rb').")
        size += len(block)
        if size > limit:
            raise PointCloudError(f"it has more than the {limit:,} bytes allowed, and is not read further.")
        target.write(block)


def _with_suffix(path: Path) -> Path:
    if not path.stat().st_size:
        raise PointCloudError("it is empty (0 bytes).")
    suffix = sniff_suffix(path)
    if suffix is None:
        raise PointCloudError("its format cannot be told from its content. Give it a name, or save it as a file.")
    return path.rename(path.with_name(path.name + suffix))


_MAGIC = {
    b"ply": ".ply",
    b"\x93NUMPY": ".npy",
    b"glTF": ".glb",
    b"ASTM-E57": ".e57",
    b"\x1f\x8b": ".gz",
    b"Kaydara FBX": ".fbx",
    b"BLENDER": ".blend",
    b"PXR-USDC": ".usdc",
    b"#usda": ".usda",
    b"# .PCD": ".pcd",
}
_BEGINNINGS = (
    (rb"(?s)(#[^\n]*\n)*\s*(VERSION|FIELDS|COLUMNS)\b.*\bDATA\b", ".pcd"),
    (rb"(?i)\s*(ST)?C?N?4?n?OFF\b", ".off"),
    (rb"(?s)\s*\{.*\"asset\"", ".gltf"),
    (rb"(?s)(\s*(#[^\n]*)?\n)*\s*(v|mtllib|o|g)\s+\S", ".obj"),
    (rb"(?s)\s*solid\b.*\bfacet\b", ".stl"),
    (rb"(?s)\s*<\?xml.*<COLLADA", ".dae"),
    (rb"(?s)\s*<\?xml.*<X3D", ".x3d"),
)


def sniff_suffix(path: Path) -> str | None:
    """The suffix that fits the content of a file; None if the content is not known."""
    with open(path, "rb") as stream:
        start = stream.read(1 << 14)
    suffix = next((suffix for magic, suffix in _MAGIC.items() if start.startswith(magic)), None)
    if suffix is not None:
        return suffix
    if start.startswith(b"LASF") and len(start) > 104:
        return ".laz" if start[104] & 0x80 else ".las"
    if start.startswith(b"PK\x03\x04"):
        return _sniff_zip(path)
    if len(start) >= 84 and path.stat().st_size == 84 + 50 * int.from_bytes(start[80:84], "little"):
        return ".stl"
    text = start.removeprefix(b"\xef\xbb\xbf")
    suffix = next((suffix for pattern, suffix in _BEGINNINGS if re.match(pattern, text)), None)
    if suffix is None and text and (b"\0" not in text or start[:2] in (b"\xff\xfe", b"\xfe\xff")):
        return ".txt"
    return suffix


# Readers of these formats never accept another content; what a 3D program writes may be packed in its own way.
_CHECKED = (".ply", ".npy", ".npz", ".pcd", ".las", ".laz", ".e57", ".txt", ".csv", ".tsv", ".xyz", ".xyzn", ".xyzrgb")
_CHECKED += (".pts", ".asc", ".dat", ".obj", ".off", ".stl")
_SAME = ({".las", ".laz"}, {".npz", ".zip"})


def check_content(path: Path):
    """Refuse a file whose beginning shows that its name says something else.

    Raises:
        PointCloudError: it is of another format, a pointer of Git LFS or a web page.
    """
    suffix = path.suffix.lower()
    with open(path, "rb") as stream:
        start = stream.read(200).lstrip()
    if start.startswith(b"version https://git-lfs"):
        raise PointCloudError("it is a pointer of Git LFS and not the file itself. Run `git lfs pull` to fetch it.")
    if re.match(rb"(?i)<!doctype html|<html", start):
        raise PointCloudError(
            "it is a web page, perhaps an error or a login page, and not the file. Download it again."
        )
    if suffix not in _CHECKED:
        return
    if start.startswith(b"\x1f\x8b"):
        raise PointCloudError(
            f"it is compressed with gzip, though its name ends in {suffix}. Rename it to end in {suffix}.gz."
        )
    if start.startswith((*_MAGIC, b"LASF", b"PK\x03\x04")):
        actual = sniff_suffix(path)
        if actual not in (None, suffix) and not any({actual, suffix} <= same for same in _SAME):
            raise PointCloudError(f"its content is {actual}, though its name ends in {suffix}. Rename or convert it.")


def _sniff_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return None
    if names and all(name.endswith(".npy") for name in names):
        return ".npz"
    if any(name.endswith(".model") for name in names):
        return ".3mf"
    return ".usdz" if any(name.endswith((".usd", ".usda", ".usdc")) for name in names) else ".zip"


def _unpack(path: Path, stack: contextlib.ExitStack) -> Path:
    """The content of a .gz; its suffix is the one before .gz, or found from the content."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    target = folder / (_safe_name(path.stem) or "cloud")
    packed_bytes = path.stat().st_size
    try:
        with gzip.open(path) as source, open(target, "wb") as stream:
            while block := source.read(_BLOCK):
                check_unpacked_size(stream.tell() + len(block), "this .gz", packed_bytes)
                stream.write(block)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise PointCloudError(f"it cannot be unpacked as .gz ({error}). The file is truncated or corrupt.") from error
    if target.suffix.lower() == ".gz":
        raise PointCloudError("it is compressed twice. Unpack it first.")
    return target if target.suffix else _with_suffix(target)


# ---- Downloads ------------------------------------------------------------------------------------------------------


def _without_secrets(text: str) -> str:
    """A URL without user, password and query; any other text as it is."""
    if not _URL.match(text):
        return text
    parts = urllib.parse.urlsplit(text)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _download(url: str, stack: contextlib.ExitStack) -> Path:
    """
    Raises:
        PointCloudError: it fails, or is not complete after `max_download_seconds`.
    """
    deadline = time.monotonic() + limits().max_download_seconds
    late = f"the download was not complete after {limits().max_download_seconds:g} seconds."
    try:
        path = _download_until(deadline, url, stack)
    except PointCloudError as error:
        if time.monotonic() < deadline:
            raise
        raise PointCloudError(late) from error
    if time.monotonic() >= deadline:  # its end may have been cut off
        raise PointCloudError(late)
    return path


def _cut(connection: socket.socket):
    """End all reading from a server, also one that sends a byte at a time. `SSLSocket.shutdown` would break a read."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _download_until(deadline: float, url: str, stack: contextlib.ExitStack) -> Path:
    try:
        for _ in range(limits().max_redirects + 1):
            connection = _connect(url, max(0.001, min(limits().url_timeout_seconds, deadline - time.monotonic())))
            stack.callback(connection.close)
            connection.connect()
            timer = threading.Timer(max(0, deadline - time.monotonic()), _cut, [connection.sock])
            timer.daemon = True
            timer.start()
            stack.callback(timer.cancel)
            parts = urllib.parse.urlsplit(url)
            target = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
            connection.request("GET", f"{target}?{parts.query}" if parts.query else target, headers={"Accept": "*/*"})
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                url = urllib.parse.urljoin(url, response.headers.get("Location", ""))
                continue
            return _save_response(response, url, stack)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
        raise PointCloudError(f"it cannot be downloaded: {printable(reason)[:200]}.") from error
    raise PointCloudError(f"it was redirected more than {limits().max_redirects} times.")


def _save_response(response: http.client.HTTPResponse, url: str, stack: contextlib.ExitStack) -> Path:
    if response.status != 200:
        raise PointCloudError(f"the server answers {response.status} {printable(response.reason)[:80]}.")
    stated = response.headers.get("Content-Length", "")
    if stated.isdecimal() and int(stated) > limits().max_download_bytes:
        raise PointCloudError(f"it has {int(stated):,} bytes, more than the {limits().max_download_bytes:,} allowed.")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    path = folder / (_safe_name(urllib.parse.unquote(urllib.parse.urlsplit(url).path)) or "cloud")
    with open(path, "wb") as target:
        _copy(response, target, limits().max_download_bytes)
    if stated.isdecimal() and path.stat().st_size < int(stated):
        raise PointCloudError(f"the download ended after {path.stat().st_size:,} of {int(stated):,} bytes.")
    return path if path.suffix else _with_suffix(path)


def _connect(url: str, timeout: float) -> http.client.HTTPSConnection:
    """A connection to an address that has been checked.

    Raises:
        PointCloudError: it is not https, or leads into a private network.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port or 443
    except ValueError as error:
        raise PointCloudError(f"this is no URL ({error}).") from error
    if parts.scheme.lower() != "https":
        raise PointCloudError(f"it leads to {parts.scheme or 'no'}://; only https:// is read.")
    if not host:
        raise PointCloudError("this URL names no host. Pass https://HOST/PATH.")
    address = _public_address(host, port)
    connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=ssl.create_default_context())
    # The name stays for the certificate; the connection goes to the address that was checked.
    connection._create_connection = lambda _, timeout, source: socket.create_connection(address, timeout, source)
    return connection


def _public_address(host: str, port: int) -> tuple[str, int]:
    """The first address of a host, after a check that all of them are public."""
    addresses = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if os.environ.get(ALLOW_PRIVATE_VARIABLE) != "1":
        for text in addresses:
            address = ipaddress.ip_address(text.partition("%")[0])
            address = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
            if address in _NAT64:  # the gateway leads to the IPv4 address in its last four bytes
                address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
            if not address.is_global or address.is_multicast:
                alias = "" if host == str(address) else f" is {address}, which"
                raise PointCloudError(f"{printable(host)}{alias} is not a public address. {HOW_TO_ALLOW}")
    return addresses[0], port
