"""A Hub on 127.0.0.1 for the real huggingface_hub client: its protocol, a log of what was asked, and faults to order.

It knows model repos with commits, branches, tags, private ones, small files inline and large ones over LFS (or Xet's tokens
and hashes). What it cannot show is hf.co's own validation, quotas and permissions.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER = "hf_writerwriterwriter", "hf_readerreaderreader"
LARGE_BYTES = 100_000


class Request(NamedTuple):
    """One line of the log; `status` is 0 where the connection was cut, `seconds` those of a clock."""

    method: str
    path: str
    status: int
    range: str | None
    seconds: float


@dataclass(frozen=True)
class File:
    """One file of a commit; `data` is None for a large one, whose sha256 is then its oid."""

    oid: str
    size: int
    data: bytes | None = None


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, File], branch: str = "main") -> str:
        """Add a commit; like git's, its oid is unlike any other's."""
        oid = hashlib.sha1(f"{len(self.commits)} {id(self)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        named = self.branches | self.tags | {oid: oid for oid in self.commits}
        return named.get(revision)


@dataclass
class Fault:
    """Goes wrong `times` times, for requests of this method whose path contains this pattern.

    Args:
        status, headers, message: of the answer instead of the right one; status 0 leaves the right one.
        cut_after: bytes of the answer's body after which the connection is cut; what was asked has then been done.
        before: called before the request is answered.
    """

    method: str
    pattern: str
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "ordered by the test"
    cut_after: int | None = None
    before: Callable[[], None] | None = None


class HubServer:
    """Start with `with HubServer() as hub`; its address is `hub.url`."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.xet_url: str | None = None
        self.xet_hashes: dict[str, str] = {}
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        # The client follows redirects to its own host even for a HEAD; the store must be another one.
        self.store_url = f"http://localhost:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def order(self, method: str, pattern: str, **details: Any) -> None:
        self.faults.append(Fault(method, pattern, **details))

    def put(self, name: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """A repo's next commit, made without the protocol; returns its oid."""
        repo = self.repos.setdefault(name, Repo(private))
        head = repo.commits.get(repo.branches.get("main"), {})
        return repo.commit(head | {path: self._stored(path, data) for path, data in files.items()})

    def head(self, name: str) -> str:
        return self.repos[name].branches["main"]

    def content(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        files = repo.commits[repo.find(revision)]
        return {path: self.objects[f.oid] if f.data is None else f.data for path, f in files.items()}

    def is_large(self, path: str, size: int) -> bool:
        return size >= LARGE_BYTES or path.endswith(".safetensors")

    def _stored(self, path: str, data: bytes) -> File:
        if not self.is_large(path, len(data)):
            return File(git_blob_oid(data), len(data), data)
        oid = hashlib.sha256(data).hexdigest()
        self.objects[oid] = data
        return File(oid, len(data))


def git_blob_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Refused(Exception):
    """Answered with an error; the client reads its code from X-Error-Code."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    ROUTES = (
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/store/(?P<oid>[0-9a-f]{64})", "put_object"),
        ("GET", r"/store/(?P<oid>[0-9a-f]{64})", "get_object"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>.+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>.+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/tag/(?P<revision>.+)", "tag"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>.+)", "paths_info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/xet-(?:read|write)-token/.+", "xet_token"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>.+))?", "info"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def answer_request(self) -> None:
        self.hub = self.server.hub
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self._fault()
        self.cut_after = fault.cut_after if fault else None
        try:
            if fault and fault.before:
                fault.before()
            if fault and fault.status:
                raise _Refused(fault.status, fault.message, headers=fault.headers)
            self._check_token()
            for method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, unquote(url.path))
                if match and method == self.command.replace("HEAD", "GET"):
                    return getattr(self, name)(**match.groupdict())
            raise _Refused(404, f"this Hub has no {self.command} {url.path}")
        except _Refused as refused:
            self.answer({"error": str(refused)}, refused.status, refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer_request

    def log_message(self, *_: object) -> None:
        pass

    # ---- answers

    def answer(
        self,
        content: Any = b"",
        status: int = 200,
        headers: dict[str, str] | None = None,
        kind: str = "application/json",
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        is_cut = self.cut_after is not None
        # Before the answer: who has it may look at the log.
        status_heard, asked_range = 0 if is_cut else status, self.headers.get("Range")
        self.hub.log.append(Request(self.command, self.path, status_heard, asked_range, time.monotonic()))
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: self.cut_after] if is_cut else body)
        if is_cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def answer_bytes(self, data: bytes, headers: dict[str, str]) -> None:
        headers = {"Accept-Ranges": "bytes", **headers}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self.answer(data[start : end + 1], 206, headers, "application/octet-stream")
        return self.answer(data, 200, headers, "application/octet-stream")

    # ---- who asks, for what

    def _fault(self) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and fault.method == self.command and re.search(fault.pattern, self.path):
                    fault.times -= 1
                    return fault
        return None

    def _check_token(self) -> None:
        authorization = self.headers.get("Authorization")
        self.token = authorization.removeprefix("Bearer ") if authorization else None
        if self.token not in (None, READER, WRITER):
            raise _Refused(401, "Invalid credentials in Authorization header")
        reads = self.command in ("GET", "HEAD") or re.search(r"/paths-info/|validate-yaml|^/store/", self.path)
        if not reads and self.token != WRITER:
            raise _Refused(403 if self.token else 401, "You don't have the rights to write here")

    def repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.token is None):
            # As the Hub: who may not see it does not learn whether it exists.
            raise _Refused(404 if self.token else 401, "Repository not found", "RepoNotFound")
        return repo

    def files(self, name: str, revision: str) -> tuple[str, dict[str, File]]:
        oid = self.repo(name).find(revision)
        if oid is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, self.hub.repos[name].commits[oid]

    # ---- the routes

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        with self.hub.lock:
            if name in self.hub.repos:
                return self.answer({**url, "error": "You already created this model repo"}, 409)
            self.hub.repos[name] = Repo(bool(wanted.get("private") or wanted.get("visibility") == "private"))
            self.hub.repos[name].commit({})
        return self.answer(url)

    def validate_yaml(self) -> None:
        self.answer({"warnings": [], "errors": []})

    def preupload(self, repo: str, revision: str) -> None:
        _, files = self.files(repo, revision)
        modes = [
            {
                "path": wanted["path"],
                "uploadMode": "lfs" if self.hub.is_large(wanted["path"], wanted["size"]) else "regular",
                "shouldIgnore": False,
                "oid": files[wanted["path"]].oid if wanted["path"] in files else None,
            }
            for wanted in json.loads(self.body)["files"]
        ]
        self.answer({"files": modes})

    def lfs_batch(self, repo: str) -> None:
        self.repo(repo)

        def reply(wanted: dict[str, Any]) -> dict[str, Any]:
            upload = {"actions": {"upload": {"href": f"{self.hub.store_url}/store/{wanted['oid']}"}}}
            return {"oid": wanted["oid"], "size": wanted["size"]} | (
                {} if wanted["oid"] in self.hub.objects else upload
            )

        self.answer({"transfer": "basic", "objects": [reply(o) for o in json.loads(self.body)["objects"]]})

    def put_object(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "the bytes are not those of this sha256")
        self.hub.objects[oid] = self.body
        self.answer()

    def get_object(self, oid: str) -> None:
        self.answer_bytes(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def commit(self, repo: str, revision: str) -> None:
        with self.hub.lock:
            head, files = self.files(repo, revision)
            files = dict(files)
            for line in self.body.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                match operation["key"]:
                    case "header":
                        if value.get("parentCommit", head) != head:
                            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
                    case "file":
                        data = base64.b64decode(value["content"])
                        files[value["path"]] = File(git_blob_oid(data), len(data), data)
                    case "lfsFile":
                        if value["oid"] not in self.hub.objects and not self.hub.xet_url:
                            raise _Refused(400, f"large file {value['oid']} was not uploaded")
                        files[value["path"]] = File(value["oid"], value["size"])
                    case other:
                        raise _Refused(400, f"this Hub knows no operation {other}")
            oid = self.hub.repos[repo].commit(files, revision)
        self.answer(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "hookOutput": ""}
        )

    def tag(self, repo: str, revision: str) -> None:
        name, (oid, _) = json.loads(self.body)["tag"], self.files(repo, revision)
        if name in self.hub.repos[repo].tags:
            raise _Refused(409, f"Tag {name} already exists")
        self.hub.repos[repo].tags[name] = oid
        self.answer({})

    def refs(self, repo: str) -> None:
        def listed(refs: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in refs.items()]

        found = self.repo(repo)
        self.answer({"branches": listed(found.branches, "heads"), "tags": listed(found.tags, "tags"), "converts": []})

    def info(self, repo: str, revision: str | None) -> None:
        oid, files = self.files(repo, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        private = self.hub.repos[repo].private
        self.answer({"id": repo, "modelId": repo, "sha": oid, "private": private, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        _, files = self.files(repo, revision)
        self.answer([self._listed(path, file) for path, file in files.items()])

    def paths_info(self, repo: str, revision: str) -> None:
        _, files = self.files(repo, revision)
        text = self.body.decode()
        paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        self.answer([self._listed(path, files[path]) for path in paths if path in files])

    def xet_token(self, repo: str) -> None:
        self.repo(repo)
        if not self.hub.xet_url:
            raise _Refused(404, "this Hub has no Xet")
        expires = int(time.time()) + 3600
        token = {"casUrl": self.hub.xet_url, "accessToken": "xet", "exp": expires}
        names = {"casUrl": "X-Xet-Cas-Url", "accessToken": "X-Xet-Access-Token", "exp": "X-Xet-Token-Expiration"}
        self.answer(token, headers={name: str(token[key]) for key, name in names.items()})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        oid, files = self.files(repo, revision)
        if path not in files:
            raise _Refused(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": oid})
        file = files[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"'}
        if file.data is not None:
            return self.answer_bytes(file.data, headers)
        headers |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(file.size)}
        headers["Location"] = f"{self.hub.store_url}/store/{file.oid}"
        if self.hub.xet_url:
            route = f"{self.hub.url}/api/models/{repo}/xet-read-token/{oid}"
            headers |= {"X-Xet-Hash": self.hub.xet_hashes[file.oid], "X-Xet-Refresh-Route": route}
        return self.answer(b"", 302, headers)

    def _listed(self, path: str, file: File) -> dict[str, Any]:
        large = {"lfs": {"oid": file.oid, "size": file.size, "pointerSize": 134}} if file.data is None else {}
        return {"type": "file", "path": path, "oid": file.oid, "size": file.size} | large
