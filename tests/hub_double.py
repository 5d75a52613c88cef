"""A Hub on loopback that serves files: what `huggingface_hub` asks for to list and download a repository."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


REVISION = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(
    repositories: dict[str, dict[str, bytes]],
    other: dict[str, bytes] | None = None,
    datasets: dict[str, dict[str, bytes]] | None = None,
):
    """Serve models and data sets (id → path → content) and other files; gives the address and the requests that came.

    A request is (method, path, Range header, Authorization header).
    """
    requests: list[tuple[str, str, str | None, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            self.answer(body=True)

        def do_POST(self):
            length = int(self.headers.get("Content-Length") or 0)
            self.wanted = self.rfile.read(length).decode()
            self.answer(body=True)

        def do_HEAD(self):
            self.answer(body=False)

        def answer(self, body: bool):
            path = unquote(urlsplit(self.path).path)
            requests.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
            content, headers = find(path)
            if content is None:
                headers, content, status = {"X-Error-Code": "EntryNotFound"}, b"", 404
            elif (span := self.headers.get("Range")) and body:
                first = int(span.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
                content, status = content[first:], 206
            else:
                status = 200
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    def find(path: str) -> tuple[bytes | None, dict[str, str]]:
        for kind, folder, repos in (("models", "/", repositories), ("datasets", "/datasets/", datasets or {})):
            for name, files in repos.items():
                if path in (f"/api/{kind}/{name}", *(f"/api/{kind}/{name}/revision/{r}" for r in (REVISION, "main"))):
                    siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
                    info = {"id": name, "sha": REVISION, "siblings": siblings, "tags": [], "private": False}
                    return as_json(info)
                for revision in (REVISION, "main"):
                    if path == f"/api/{kind}/{name}/paths-info/{revision}" or path.startswith(
                        f"/api/{kind}/{name}/tree/{revision}"
                    ):
                        return as_json(
                            [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()]
                        )
                    content = files.get(path.removeprefix(f"{folder}{name}/resolve/{revision}/"))
                    if content is not None:
                        etag = hashlib.sha256(content).hexdigest()
                        return content, {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        return (other or {}).get(path), {"Accept-Ranges": "bytes"}

    def as_json(value) -> tuple[bytes, dict[str, str]]:
        return json.dumps(value).encode(), {"Content-Type": "application/json"}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
