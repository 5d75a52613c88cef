"""A Hub on loopback that stores and serves models and data sets, for the real `huggingface_hub` client.

The client uses it if the environment has `HF_ENDPOINT=hub.address` and `HF_HUB_DISABLE_XET=1` before its import. As on the
Hub, each commit has an id and stays readable, writing and private repositories need a token (any will do), and large files
are on another host, which must get no token. Unlike the Hub, it has no Xet and no pull requests, does not build spaces, lists come in
one page, and the metadata of a card are always valid.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


LARGE_SUFFIXES = (".safetensors", ".bin", ".pth", ".parquet", ".npy")
FIRST_FILES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


class Request(NamedTuple):
    method: str
    path: str
    range: str | None
    authorization: str | None


class Answer(NamedTuple):
    content: bytes = b""
    headers: dict[str, str] = {}
    status: int = 200


class Refused(Exception):
    """The client tells by `code` whether a repository, a revision or a file is missing."""

    def __init__(self, status: int, code: str = "", **extra):
        self.answer = Answer(json.dumps({"error": code} | extra).encode(), {"X-Error-Code": code}, status)


@dataclass
class Repository:
    id: str
    url: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # revision id → path → content
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def revision(self, name: str) -> str:
        """The id of a branch, a tag or an id."""
        revision = self.branches.get(name) or self.tags.get(name) or name
        if revision not in self.commits:
            raise Refused(404, "RevisionNotFound")
        return revision

    def files(self, name: str) -> dict[str, bytes]:
        return self.commits[self.revision(name)]

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        revision = hashlib.sha1(f"{self.url} {len(self.commits)}".encode()).hexdigest()
        self.commits[revision], self.branches[branch] = files, revision
        return revision


class Hub:
    """The repositories on the Hub, the requests that it got, and the ones that it will refuse (`fail_next`)."""

    def __init__(self, address: str, other: dict[str, bytes]):
        self.address, self.other = address, other
        self.store_address = address.replace("127.0.0.1", "localhost")  # to the client another host
        self.store: dict[str, bytes] = {}  # sha256 → content of a large file
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[Request] = []
        self.failures: list[tuple[int, str]] = []
        self.lock = threading.Lock()

    def add(self, kind: str, repo_id: str, files: dict[str, bytes], private: bool = False) -> Repository:
        """`kind`: "models" or "datasets"."""
        url = f"{self.address}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
        repository = self.repositories[kind, repo_id] = Repository(repo_id, url, private)
        repository.commit(dict(files))
        self.store |= {hashlib.sha256(c).hexdigest(): c for path, c in files.items() if is_large(path, len(c))}
        return repository

    def fail_next(self, count: int, status: int, part: str = ""):
        """Refuse the next `count` writing requests with `part` in their path, "/commit/" say."""
        with self.lock:
            self.failures += [(status, part)] * count

    def answer(self, request: Request, url: str, body: bytes) -> Answer:
        with self.lock:
            self.requests.append(request)
            try:
                writes = request.method in ("POST", "PUT") and "/paths-info/" not in request.path
                for failure in self.failures if writes else ():
                    if failure[1] in request.path:
                        self.failures.remove(failure)
                        raise Refused(failure[0])
                if request.path in self.other:
                    return Answer(self.other[request.path], {"Accept-Ranges": "bytes"})
                if request.path.startswith("/store/"):
                    return self.stored(request, body)
                if (writes or request.path == "/api/whoami-v2") and not request.authorization:
                    raise Refused(401)
                return self.route(request, url, body)
            except Refused as refused:
                return refused.answer

    def route(self, request: Request, url: str, body: bytes) -> Answer:
        """/api/models/org/name/…, /org/name/resolve/… and /org/name.git/…, or with datasets or spaces."""
        # Revisions and paths may contain a slash as %2F, so the address is split before it is unquoted.
        parts, query = [unquote(part) for part in urlsplit(url).path[1:].split("/")], parse_qs(urlsplit(url).query)
        match parts:
            case ["api", "whoami-v2"]:
                return as_json({"type": "user", "name": "somebody", "orgs": [{"type": "org", "name": "org"}]})
            case ["api", "validate-yaml"]:
                return as_json({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                return self.create(json.loads(body))
            case ["api", kind, owner, name, *rest] | ["datasets" | "spaces" as kind, owner, name, *rest]:
                pass
            case [owner, name, *rest]:
                kind = "models"
            case _:
                raise Refused(404, "EntryNotFound")
        repository = self.repositories.get((kind, f"{owner}/{name.removesuffix('.git')}"))
        if repository is None or (repository.private and not request.authorization):
            raise Refused(404 if request.authorization else 401, "RepoNotFound")
        match rest or ["revision", "main"]:
            case ["revision", revision]:
                return as_json(information(repository, repository.revision(revision)))
            case ["tree", revision, *folder]:
                recursive = query.get("recursive", [""])[0].lower() == "true"
                return as_json(tree(repository.files(revision), "/".join(folder), recursive))
            case ["paths-info", revision]:
                paths = parse_qs(body.decode()).get("paths", [])
                return as_json([entry for entry in tree(repository.files(revision)) if entry["path"] in paths])
            case ["refs"]:
                return as_json(references(repository))
            case ["resolve", revision, *path]:
                return self.file(repository, repository.revision(revision), "/".join(path))
            case ["preupload", revision]:
                files = repository.files(revision)
                return as_json({"files": [upload_mode(file, files) for file in json.loads(body)["files"]]})
            case ["info", "lfs", "objects", "batch"]:
                return as_json({"objects": [self.upload(large) for large in json.loads(body)["objects"]]})
            case ["commit", branch] if "create_pr" not in query:
                revision = self.commit(repository, branch, map(json.loads, body.splitlines()))
                return as_json({"commitOid": revision, "commitUrl": f"{repository.url}/commit/{revision}"})
            case ["branch", name]:
                start = json.loads(body).get("startingPoint", "main")
                return add_name(repository.branches, name, repository.revision(start))
            case ["tag", revision]:
                return add_name(repository.tags, json.loads(body)["tag"], repository.revision(revision))
        raise Refused(404, "EntryNotFound")

    def create(self, settings: dict) -> Answer:
        kind = f"{settings.get('type', 'model')}s"
        repo_id = f"{settings.get('organization') or 'somebody'}/{settings['name']}"
        if (kind, repo_id) in self.repositories:  # with exist_ok the client reads the address from the refusal
            raise Refused(409, url=self.repositories[kind, repo_id].url)
        # Newer clients send a visibility, older ones whether it is private.
        private = settings.get("visibility") == "private" or bool(settings.get("private"))
        return as_json({"url": self.add(kind, repo_id, FIRST_FILES, private).url})

    def upload(self, large: dict) -> dict:
        """The address for uploading a large file; none if the Hub has it."""
        href = f"{self.store_address}/store/{large['oid']}"
        return large if large["oid"] in self.store else large | {"actions": {"upload": {"href": href}}}

    def stored(self, request: Request, body: bytes) -> Answer:
        oid = request.path.removeprefix("/store/")
        if request.method == "PUT" and hashlib.sha256(body).hexdigest() == oid:
            self.store[oid] = body
            return Answer()
        if request.method == "PUT" or oid not in self.store:
            raise Refused(400)
        return Answer(self.store[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def commit(self, repository: Repository, branch: str, lines) -> str:
        if branch not in repository.branches:
            raise Refused(404, "RevisionNotFound")
        files = dict(repository.files(branch))
        for line in lines:
            match line["key"], line["value"]:
                case "header", header:
                    if not repository.branches[branch].startswith(header.get("parentCommit", "")):
                        raise Refused(412)
                case "file", file:
                    files[file["path"]] = base64.b64decode(file["content"])
                case "lfsFile", file if file["oid"] in self.store:
                    files[file["path"]] = self.store[file["oid"]]
                case "deletedFile", file if file["path"] in files:
                    del files[file["path"]]
                case _:
                    raise Refused(400)
        return repository.commit(files, branch)

    def file(self, repository: Repository, revision: str, path: str) -> Answer:
        if path not in repository.commits[revision]:
            raise Refused(404, "EntryNotFound")
        content, headers = repository.commits[revision][path], {"X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        entry = describe(path, content)
        if "lfs" not in entry:
            return Answer(content, headers | {"ETag": f'"{entry["oid"]}"'})
        oid = entry["lfs"]["oid"]
        headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        return Answer(b"", headers | {"Location": f"{self.store_address}/store/{oid}"}, 302)


# ---- What the answers say --------------------------------------------------------------------------------------------


def as_json(value) -> Answer:
    return Answer(json.dumps(value).encode(), {"Content-Type": "application/json"})


def is_large(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LARGE_SUFFIXES) or size > 1_000_000)


def describe(path: str, content: bytes) -> dict:
    """A file's entry, with the names that trees use and those that repository information uses."""
    entry = {"type": "file", "path": path, "rfilename": path, "size": len(content)}
    if is_large(path, len(content)):  # git stores a pointer instead
        sha256 = hashlib.sha256(content).hexdigest()
        content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": entry["size"], "pointerSize": len(content)}
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return entry | {"oid": oid, "blobId": oid}


def tree(files: dict[str, bytes], folder: str = "", recursive: bool = True) -> list[dict]:
    """Files and folders below a folder."""
    start = f"{folder}/" if folder else ""
    entries = {path: describe(path, content) for path, content in files.items() if path.startswith(start)}
    if folder and not entries:
        raise Refused(404, "EntryNotFound")
    for path in list(entries):
        while len(path := path.rpartition("/")[0]) > len(folder):
            entries[path] = {"type": "directory", "path": path, "oid": ""}
    return [entry for path, entry in sorted(entries.items()) if recursive or "/" not in path.removeprefix(start)]


def information(repository: Repository, revision: str) -> dict:
    siblings = [describe(path, content) for path, content in repository.commits[revision].items()]
    return {"id": repository.id, "sha": revision, "private": repository.private, "siblings": siblings, "tags": []}


def references(repository: Repository) -> dict:
    answer = {"converts": [], "pullRequests": []}
    for key, names, folder in (("branches", repository.branches, "heads"), ("tags", repository.tags, "tags")):
        answer[key] = [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": at} for n, at in names.items()]
    return answer


def add_name(names: dict[str, str], name: str, revision: str) -> Answer:
    if name in names:
        raise Refused(409)
    names[name] = revision
    return Answer()


def upload_mode(file: dict, files: dict[str, bytes]) -> dict:
    """How the client must send a file; it sends nothing if its file has this `oid`."""
    mode = {"path": file["path"], "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular"}
    entry = describe(file["path"], files[file["path"]]) if file["path"] in files else {"oid": None}
    return mode | {"shouldIgnore": False, "oid": entry.get("lfs", entry)["oid"]}


def cut(answer: Answer, span: str) -> Answer:
    """What a Range header asks for: `bytes=3-5` or `bytes=3-`."""
    size = len(answer.content)
    first, last = span.removeprefix("bytes=").split("-")
    part = answer.content[int(first) : int(last) + 1 if last else size]
    span = f"bytes {first}-{int(first) + len(part) - 1}/{size}"
    return Answer(part, answer.headers | {"Content-Range": span}, 206)


# ---- Serving ---------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        body, span = self.rfile.read(int(self.headers.get("Content-Length") or 0)), self.headers.get("Range")
        path = unquote(urlsplit(self.path).path)
        request = Request(self.command, path, span, self.headers.get("Authorization"))
        answer = self.server.hub.answer(request, self.path, body)
        if span and self.command == "GET" and answer.status == 200:
            answer = cut(answer, span)
        self.send_response(answer.status)
        for name, value in (answer.headers | {"Content-Length": str(len(answer.content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)

    do_HEAD = do_POST = do_PUT = do_GET


@contextmanager
def serve(
    models: dict[str, dict[str, bytes]] | None = None,
    other: dict[str, bytes] | None = None,
    datasets: dict[str, dict[str, bytes]] | None = None,
):
    """A running `Hub` with models and data sets (id → path → content) and other files (path → content)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}", other or {})
    for kind, repositories in (("models", models), ("datasets", datasets)):
        for repo_id, files in (repositories or {}).items():
            hub.add(kind, repo_id, files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
