"""A Hub on 127.0.0.1: as much of its protocol as the real clients speak, from plain folders, with faults on demand.

`conftest.py` points HF_ENDPOINT at a port on which nobody listens. While a `LittleHub` is open it listens there, so
that this process and every process started from it reach it with huggingface_hub, datasets and diffusers as they are.
"""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

KINDS = ("models", "datasets", "spaces")
USER = "somebody"
# what the real Hub keeps in its large file storage is told from the rest by the ending
_LARGE = frozenset((".parquet", ".zip", ".safetensors", ".bin", ".onnx", ".png", ".jpg", ".arrow"))
_PAGE = 1000


def reserve_port() -> socket.socket:
    """A port of 127.0.0.1 that nobody else gets: connections are refused until a `LittleHub` listens there too."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


@dataclass
class Request:
    """One line of the log: what was asked for, and what was answered."""

    method: str
    path: str
    range: str
    status: int = 0
    sent: int = 0


@dataclass
class Fault:
    """What goes wrong with requests whose path matches a pattern.

    Attributes:
        pattern: of `fnmatch`, on the path without the query.
        status: answer with this instead; 0 answers as usual but for what follows.
        retry_after: seconds, as the header of this name.
        cut: the connection is cut after so many bytes of the body.
        stall: seconds of silence before the answer.
        damage: replaces bytes of the body, at the place of the file that it names.
        times: how many requests are spoilt; None spoils all.
        skip: requests that match and are answered as usual before that.
        methods: which ones are spoilt.
    """

    pattern: str
    status: int = 0
    retry_after: int | None = None
    cut: int | None = None
    stall: float = 0.0
    damage: tuple[int, bytes] | None = None
    times: int | None = 1
    skip: int = 0
    methods: tuple[str, ...] = ("GET",)


@cache
def _digests(path: str, size: int, _modified: int) -> tuple[str, str]:
    """The git and the LFS name of a file: SHA-1 with git's header, SHA-256."""
    content = Path(path).read_bytes()
    return hashlib.sha1(b"blob %d\0" % size + content).hexdigest(), hashlib.sha256(content).hexdigest()


class LittleHub:
    """Repositories in folders ROOT/models/OWNER/NAME, ROOT/datasets/OWNER/NAME and ROOT/spaces/OWNER/NAME, served.

    A commit's name is a hash of what the repository holds, so caches of the clients are valid between tests. Writing
    needs a token, any token. Only one can be open at a time.

    Args:
        root: a folder, which may be empty.
        endpoint: where to listen; HF_ENDPOINT where nothing is said.

    Attributes:
        log: all requests so far.
    """

    _running = threading.Lock()

    def __init__(self, root: Path, endpoint: str | None = None) -> None:
        self.root = root
        self.endpoint = endpoint or os.environ["HF_ENDPOINT"]
        self.log: list[Request] = []
        self._faults: list[Fault] = []
        self._connections: set[socket.socket] = set()
        self._mutex = threading.Lock()
        self._server: ThreadingHTTPServer | None = None

    # ---- being there or not

    def __enter__(self) -> LittleHub:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen."""
        assert self._running.acquire(blocking=False), "another LittleHub is open"
        hub = self

        class Server(ThreadingHTTPServer):
            allow_reuse_port = True
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: Any) -> None:
                """A client may hang up whenever it likes."""

        class Handler(_Handler):
            little_hub = hub

        address = urlsplit(self.endpoint)
        self._server = Server((address.hostname or "", address.port or 0), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Hang up on everybody and refuse connections from now on; calling it again does nothing."""
        if self._server is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._server = None
        with self._mutex:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._running.release()

    # ---- repositories

    def repo(self, identifier: str, kind: str = "datasets") -> Path:
        """The folder of a repository, made if need be. Put files in it, or symbolic links."""
        folder = self.root / kind / identifier
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def files(self, kind: str, identifier: str) -> dict[str, Path]:
        """All files of a repository by their paths in it."""
        folder = self.root / kind / identifier
        return {
            path.relative_to(folder).as_posix(): path
            for path in sorted(
                Path(base) / name for base, _, names in os.walk(folder, followlinks=True) for name in names
            )
        }

    def commit(self, kind: str, identifier: str) -> str:
        """The name of a repository's only commit."""
        names = [(name, self.digests(path)[0]) for name, path in self.files(kind, identifier).items()]
        return hashlib.sha1(repr((kind, identifier, names)).encode()).hexdigest()

    @staticmethod
    def digests(path: Path) -> tuple[str, str]:
        status = path.stat()
        return _digests(str(path.resolve()), status.st_size, status.st_mtime_ns)

    # ---- faults

    def fail(self, pattern: str, **how: Any) -> None:
        """Spoil requests, see `Fault`."""
        self._faults.append(Fault(pattern, **how))

    def heal(self) -> None:
        """No faults any more."""
        self._faults.clear()

    def _fault(self, method: str, path: str) -> Fault | None:
        with self._mutex:
            for fault in self._faults:
                if method in fault.methods and fnmatch.fnmatch(path, fault.pattern) and fault.times != 0:
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    # ---- the log

    def requests(self, pattern: str = "*", method: str = "*") -> list[Request]:
        """Lines of the log whose path and method match."""
        return [r for r in list(self.log) if fnmatch.fnmatch(r.path, pattern) and fnmatch.fnmatch(r.method, method)]


_API = re.compile(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/([^/]+)(?:/([^/]+)(?:/(.*))?)?)?$")
_RESOLVE = re.compile(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")
_LFS_BATCH = re.compile(r"/(?:datasets/|spaces/)?[^/]+/[^/]+\.git/info/lfs/objects/batch$")


class _Answer(Exception):  # noqa: N818  it is no error
    """The end of a request: a status, a body, headers."""

    def __init__(self, status: int, body: Any = b"", **headers: str) -> None:
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    little_hub: LittleHub

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.little_hub._mutex:
            self.little_hub._connections.add(self.connection)

    def finish(self) -> None:
        with self.little_hub._mutex:
            self.little_hub._connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        """The log of the Hub is enough."""

    def handle_one(self) -> None:
        hub = self.little_hub
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        length = int(self.headers.get("Content-Length") or 0)
        self.content = self.rfile.read(length) if length else self._chunks()
        entry = Request(self.command, unquote(url.path), self.headers.get("Range") or "")
        fault = hub._fault(self.command, entry.path) or Fault("", times=0)
        if fault.stall:
            time.sleep(fault.stall)
        try:
            if fault.status:
                retry = {} if fault.retry_after is None else {"Retry_After": str(fault.retry_after)}
                raise _Answer(fault.status, {"error": "a fault"}, **retry)
            self._route(url.path, fault)
        except _Answer as answer:
            body = answer.body
            entry.status = answer.status
            hub.log.append(entry)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if "Content-Length" not in answer.headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault.cut is not None and fault.cut < len(body):
                body = body[: fault.cut]
                self.close_connection = True
            entry.sent = len(body)  # before: who asked may look at once
            self.wfile.write(body)
            if self.close_connection:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    # ---- what is where; each of these ends in an _Answer

    def _route(self, path: str, fault: Fault) -> None:
        if found := _RESOLVE.match(path):
            kind, identifier, revision, name = found.groups()
            self._resolve(kind or "models", identifier, unquote(revision), unquote(name), fault)
        if found := _API.match(path):
            kind, identifier, call, revision, rest = found.groups()
            self._api(kind, identifier, call or "", unquote(revision or "main"), unquote(rest or ""))
        if path == "/api/validate-yaml":
            raise _Answer(200, {"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            self._need_token()
            raise _Answer(200, {"type": "user", "id": "0", "name": USER, "fullname": USER, "orgs": []})
        if path == "/api/repos/create":
            self._create()
        if _LFS_BATCH.match(path):
            self._lfs_batch()
        if path.startswith("/lfs/") and self.command == "PUT":
            stored = self.little_hub.root / ".lfs" / path.removeprefix("/lfs/")
            stored.parent.mkdir(parents=True, exist_ok=True)
            stored.write_bytes(self.content)
            raise _Answer(200)
        raise _Answer(404, {"error": "Not Found"})

    def _need_token(self) -> None:
        if not (self.headers.get("Authorization") or "").startswith("Bearer "):
            raise _Answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")

    def _check(self, kind: str, identifier: str, revision: str) -> str:
        """The commit, where there are such a repository and such a revision."""
        if not (self.little_hub.root / kind / identifier).is_dir():
            raise _Answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        commit = self.little_hub.commit(kind, identifier)
        if revision not in ("main", commit):
            raise _Answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        return commit

    def _resolve(self, kind: str, identifier: str, revision: str, name: str, fault: Fault) -> None:
        commit = self._check(kind, identifier, revision)
        path = self.little_hub.files(kind, identifier).get(name)
        if path is None:
            raise _Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        size = path.stat().st_size
        git, sha = self.little_hub.digests(path)
        headers = {
            "X_Repo_Commit": commit,
            "ETag": f'"{sha if path.suffix in _LARGE else git}"',
            "Accept_Ranges": "bytes",
            "Content_Type": "application/octet-stream",
        }
        start, stop, status = 0, size, 200
        if found := re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range") or ""):
            start, stop, status = int(found[1]), min(int(found[2] or size) + 1, size), 206
            if start >= size:
                raise _Answer(416, b"", Content_Range=f"bytes */{size}", **headers)
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{size}"
        if self.command == "HEAD":
            raise _Answer(status, b"", Content_Length=str(stop - start), **headers)
        with path.open("rb") as file:
            file.seek(start)
            body = bytearray(file.read(stop - start))
        if fault.damage is not None:
            place, wrong = fault.damage
            for i, byte in enumerate(wrong, place):
                if start <= i < stop:
                    body[i - start] = byte
        raise _Answer(status, bytes(body), **headers)

    def _entry(self, name: str, path: Path) -> dict[str, Any]:
        git, sha = self.little_hub.digests(path)
        entry: dict[str, Any] = {"type": "file", "path": name, "size": path.stat().st_size, "oid": git}
        if path.suffix in _LARGE:
            entry["lfs"] = {"oid": sha, "size": entry["size"], "pointerSize": 130}
        return entry

    def _entries(self, kind: str, identifier: str) -> Iterator[dict[str, Any]]:
        """Files and folders, each folder before what lies in it."""
        folders = set()
        for name, path in self.little_hub.files(kind, identifier).items():
            parts = name.split("/")
            for depth in range(1, len(parts)):
                folder = "/".join(parts[:depth])
                if folder not in folders:
                    folders.add(folder)
                    yield {"type": "directory", "path": folder, "oid": hashlib.sha1(folder.encode()).hexdigest()}
            yield self._entry(name, path)

    def _api(self, kind: str, identifier: str, call: str, revision: str, rest: str) -> None:
        commit = self._check(kind, identifier, revision if call != "refs" else "main")
        if call in ("", "revision"):
            files = self.little_hub.files(kind, identifier)
            facts = {"id": identifier, "sha": commit, "private": False, "gated": False, "disabled": False, "tags": []}
            siblings = [{"rfilename": name} for name in files]
            card = yaml.safe_load(files["README.md"].read_text().split("---")[1]) if "README.md" in files else None
            more = {"downloads": 0, "likes": 0, "_id": "0", "siblings": siblings, "cardData": card}
            raise _Answer(200, {**facts, **more})
        if call == "refs":
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit}
            raise _Answer(200, {"branches": [main], "converts": [], "tags": []})
        if call == "tree":
            self._tree(kind, identifier, rest)
        if call == "paths-info":
            wanted = self._fields("paths")
            raise _Answer(200, [e for e in self._entries(kind, identifier) if e["path"] in wanted])
        if call == "preupload":
            self._need_token()
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if Path(file["path"]).suffix in _LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.content)["files"]
            ]
            raise _Answer(200, {"files": modes})
        if call == "commit":
            self._need_token()
            self._commit(kind, identifier)
        raise _Answer(404, {"error": "Not Found"})

    def _fields(self, name: str) -> list[str]:
        if (self.headers.get("Content-Type") or "").startswith("application/json"):
            values = json.loads(self.content)[name]
            return [values] if isinstance(values, str) else list(values)
        return parse_qs(self.content.decode()).get(name, [])

    def _tree(self, kind: str, identifier: str, folder: str) -> None:
        inside = f"{folder.rstrip('/')}/" if folder else ""
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = [
            entry
            for entry in self._entries(kind, identifier)
            if entry["path"].startswith(inside) and (deep or "/" not in entry["path"][len(inside) :])
        ]
        if folder and not entries:
            raise _Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + _PAGE < len(entries):
            here = f"{self.little_hub.endpoint}{urlsplit(self.path).path}"
            headers["Link"] = f'<{here}?recursive={str(deep).lower()}&cursor={start + _PAGE}>; rel="next"'
        raise _Answer(200, entries[start : start + _PAGE], **headers)

    def _create(self) -> None:
        self._need_token()
        wanted = json.loads(self.content)
        kind = f"{wanted.get('type') or 'model'}s"
        identifier = f"{wanted.get('organization') or USER}/{wanted['name']}"
        prefix = "" if kind == "models" else f"{kind}/"
        answer = {"url": f"{self.little_hub.endpoint}/{prefix}{identifier}", "name": identifier, "id": "0"}
        if (self.little_hub.root / kind / identifier).is_dir():
            raise _Answer(409, {**answer, "error": "You already created this repo"})
        self.little_hub.repo(identifier, kind)
        raise _Answer(200, answer)

    def _lfs_batch(self) -> None:
        self._need_token()
        objects = [
            {
                "oid": wanted["oid"],
                "size": wanted["size"],
                "actions": {"upload": {"href": f"{self.little_hub.endpoint}/lfs/{wanted['oid']}", "header": {}}},
            }
            for wanted in json.loads(self.content)["objects"]
        ]
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, kind: str, identifier: str) -> None:
        folder = self.little_hub.repo(identifier, kind)
        for line in self.content.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                continue
            target = folder / value["path"]
            if operation["key"] in ("deletedFile", "deletedFolder"):
                for path in [target] if target.is_file() else [p for p in target.rglob("*") if p.is_file()]:
                    path.unlink()
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if operation["key"] == "file":
                target.write_bytes(base64.b64decode(value["content"]))
            else:
                stored = (self.little_hub.root / ".lfs" / value["oid"]).read_bytes()
                if hashlib.sha256(stored).hexdigest() != value["oid"]:
                    raise _Answer(400, {"error": f"{value['path']} did not arrive whole"})
                target.write_bytes(stored)
        commit = self.little_hub.commit(kind, identifier)
        url = f"{self.little_hub.endpoint}/{'' if kind == 'models' else kind + '/'}{identifier}/commit/{commit}"
        raise _Answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
