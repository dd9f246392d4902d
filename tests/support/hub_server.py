"""A Hugging Face Hub on loopback, for tests: what huggingface_hub asks a real one for, and a record of it.

Large files live elsewhere, as on the real Hub: /resolve redirects to another host ("localhost"), which honours ranges.
"""

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

LARGE = ".safetensors"


class Request(NamedTuple):
    """What the server was asked for, and how much of a file it sent."""

    method: str
    path: str
    start: int  # first byte that was wanted
    sent: int


@dataclass
class Hub:
    """Repositories by "org/repo" and revision ("main", a tag, a commit): folders. A thread serves them.

    The next connections for a large file break after so many bytes each as `cuts` lists; with `hold` set,
    they wait there until it is cleared. `claims` are sizes that are announced in place of the true ones.
    """

    repos: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    log: list[Request] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    hold: bool = False
    slow: float = 0.0  # seconds between pieces of a large file
    ignore_ranges: bool = False
    spoil: bool = False  # large files arrive with their last byte changed
    claims: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> "Hub":
        hub = self
        handler = type("Bound", (Handler,), {"hub": hub})
        self.server = Server(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Be gone: connections are refused from now on."""
        self.hold = False
        self.server.shutdown()
        self.server.server_close()

    @property
    def port(self) -> int:
        return self.server.server_port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, repo: str, folder: Path, revision: str = "main") -> str:
        """Serve a folder as a revision of a repository; returns its commit."""
        commit = hashlib.sha1(f"{repo} {folder}".encode()).hexdigest()
        self.repos.setdefault(repo, {}).update({revision: folder, commit: folder})
        return commit

    def names(self, method: str = "GET") -> set[str]:
        """The files that were asked for, by their last name."""
        return {r.path.rsplit("/", 1)[-1] for r in self.log if r.method == method and "/api/" not in r.path}

    def received(self, end: str = LARGE) -> list[Request]:
        """The requests that were answered with bytes of files of this kind."""
        return [r for r in self.log if r.method == "GET" and r.path.endswith(end) and r.sent]


class Server(ThreadingHTTPServer):
    """Clients that go away in the middle are part of the tests."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hub does."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self.describe("/".join(parts[2:4]), "/".join(parts[5:]) if len(parts) > 5 else "main")
        elif len(parts) >= 5 and parts[2] == "resolve":
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        elif parts[0] == "cdn" and len(parts) >= 5 and self.headers.get("Authorization"):
            self.refuse(400, "", "credentials of the Hub left it")
        elif parts[0] == "cdn" and len(parts) >= 5:
            self.send_file(self.hub.repos["/".join(parts[1:3])][parts[3]] / "/".join(parts[4:]), {})
        else:
            self.refuse(404, "", "nothing there")

    def refuse(self, status: int, code: str, message: str) -> None:
        self.note()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def note(self, start: int = 0, sent: int = 0) -> None:
        self.hub.log.append(Request(self.command, unquote(urlparse(self.path).path), start, sent))

    def find(self, repo: str, revision: str) -> tuple[Path, str] | None:
        """The folder and commit of a revision; None if it was refused."""
        revisions = self.hub.repos.get(repo)
        if revisions is None:
            self.refuse(401, "RepoNotFound", "Repository not found")
        elif revision not in revisions:
            self.refuse(404, "RevisionNotFound", "Revision not found")
        else:
            folder = revisions[revision]
            return folder, next(name for name, f in revisions.items() if f == folder and len(name) == 40)
        return None

    def describe(self, repo: str, revision: str) -> None:
        """/api/models: what files there are."""
        found = self.find(repo, revision)
        if not found:
            return
        folder, commit = found
        siblings = [self.listed(folder, file) for file in sorted(folder.rglob("*")) if file.is_file()]
        body = json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()
        self.note()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def listed(self, folder: Path, file: Path) -> dict[str, Any]:
        """What the listing says of a file, with its size and, of a large one, its SHA-256 where that is asked for."""
        name = str(file.relative_to(folder))
        if "blobs=" not in urlparse(self.path).query:
            return {"rfilename": name}
        size = self.hub.claims.get(name, file.stat().st_size)
        about = {"rfilename": name, "size": size, "blobId": "0" * 40}
        if not name.endswith(LARGE):
            return about
        return about | {
            "lfs": {"size": size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "pointerSize": 130}
        }

    def resolve(self, repo: str, revision: str, name: str) -> None:
        """/resolve: a small file itself, a large one by a redirect, with what it is in headers."""
        found = self.find(repo, revision)
        if not found:
            return
        folder, commit = found
        file = folder / name
        if repo in self.hub.gated:
            self.refuse(403, "GatedRepo", "Access is restricted")
        elif not file.is_file():
            self.refuse(404, "EntryNotFound", "Entry not found")
        elif name.endswith(LARGE):
            self.note()
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.hub.port}/cdn/{repo}/{commit}/{name}")
            self.send_header("X-Repo-Commit", commit)
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"')
            self.send_header("X-Linked-Size", str(self.hub.claims.get(name, file.stat().st_size)))
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            etag = hashlib.sha1(file.read_bytes()).hexdigest()
            self.send_file(file, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    def send_file(self, file: Path, headers: dict[str, str]) -> None:
        content, start, status = file.read_bytes(), 0, 200
        wanted = self.headers.get("Range")
        if wanted and not self.hub.ignore_ranges:
            start, status = int(wanted.removeprefix("bytes=").split("-")[0]), 206
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        large = file.name.endswith(LARGE)
        if large and self.hub.spoil:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content) - start)}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            self.note()
            return
        cut = self.hub.cuts.pop(0) if large and self.hub.cuts else len(content)
        rest = content[start : start + cut]
        self.note(start, len(rest))
        for piece in range(0, len(rest), 16384):
            self.wfile.write(rest[piece : piece + 16384])
            time.sleep(self.hub.slow if large else 0)
        if start + cut < len(content):
            while self.hub.hold:
                time.sleep(0.01)
            self.close_connection = True
