"""A server on loopback that speaks as much of the Hub's API as fetching a checkpoint takes."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """A repo: `commits` holds the files of each commit, `refs` where branches are.

    `stated` replaces the sha256 that is stated of a file, of which none is stated without
    `lfs`. A repo with a `token` is gated; one that is `private` is not even told of to others.
    """

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    stated: dict[str, str] = field(default_factory=dict)
    token: str = ""
    private: bool = False
    lfs: bool = True

    @classmethod
    def of(cls, folder: Path, commit: str = "a" * 40) -> "Repo":
        """One commit, of the files of a folder and one that no conversion needs."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return cls({commit: files | {"pytorch_model.bin": b"not needed"}}, {"main": commit})

    def sha256(self, commit: str, name: str) -> str:
        return self.stated.get(name) or hashlib.sha256(self.commits[commit][name]).hexdigest()


@dataclass
class Fault:
    """What goes wrong with a request whose method and path fit, so many times.

    `does` is a status, or a share of the answer, after which the connection is closed, or what is
    called in the middle of the answer.
    """

    method: str
    path: str
    does: int | float | Callable[[], None]
    times: int = 10**6


class Hub(ThreadingHTTPServer):
    """The server; `asked` lists method, path and range of what it was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.asked: list[tuple[str, str, str]] = []
        self.after: Callable[[str, str], None] = lambda method, path: None
        self.lock = Lock()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def fault(self, method: str, path: str) -> int | float | Callable[[], None] | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and method == fault.method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault.does
        return None

    def fetched(self, suffix: str = "") -> list[str]:
        """The names of files whose content, not a range of it, was asked for, in order."""
        whole = [path for method, path, part in self.asked if method == "GET" and not part]
        names = [path.rpartition("/")[2] for path in whole if "/resolve/" in path]
        return [name for name in names if name.endswith(suffix)]


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub without repos, as long as the block runs."""
    with Hub() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802
        self._answer()

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.asked.append((self.command, path, self.headers.get("Range", "")))
        does = self.server.fault(self.command, path)
        if isinstance(does, int):
            self._send(does, b"{}", {"Retry-After": "0"})
        else:
            self._serve(path, does)
        self.server.after(self.command, path)

    def _serve(self, path: str, does: float | Callable[[], None] | None) -> None:
        found = re.fullmatch(
            r"/(?:api/models/)?([^/]+/[^/]+?)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path
        )
        name, kind, revision, file = found.groups() if found else ("", "", "", "")
        repo = self.server.repos.get(name)
        allowed = repo is not None and self.headers.get("Authorization") in (
            f"Bearer {repo.token}",
            None if not repo.token else "",
        )
        if repo is None or (repo.private and not allowed):
            return self._send(404 if repo is None else 401, b"", {"X-Error-Code": "RepoNotFound"})
        commit = repo.refs.get(revision or "main", revision or "")
        if commit not in repo.commits:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if kind != "resolve":
            files = [_entry(repo, commit, name) for name in sorted(repo.commits[commit])]
            names = [entry | {"rfilename": entry["path"]} for entry in files]
            about = {"id": name, "sha": commit, "siblings": names}
            return self._send(200, json.dumps(files if kind == "tree" else about).encode(), {})
        if repo.token and not allowed:
            status = 403 if self.headers.get("Authorization") else 401
            return self._send(status, b"", {"X-Error-Code": "GatedRepo"})
        if file not in repo.commits[commit]:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        content, status = repo.commits[commit][file], 200
        headers = {"X-Repo-Commit": commit, "ETag": f'"{repo.sha256(commit, file)}"'}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, size = int(part[1]), len(content)
            end = min(int(part[2] or size), size - 1)
            content, status = content[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        self._send(status, content, headers, does)

    def _send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str],
        does: float | Callable[[], None] | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        part = int((does if isinstance(does, float) else 0.5) * len(content))
        self.wfile.write(content[:part])
        if isinstance(does, float):
            self.close_connection = True
            return
        if does is not None:
            does()
        with suppress(ConnectionError):  # whoever asked may have gone
            self.wfile.write(content[part:])


def _entry(repo: Repo, commit: str, name: str) -> dict:
    digest, size = repo.sha256(commit, name), len(repo.commits[commit][name])
    entry = {"type": "file", "path": name, "size": size, "oid": digest[:40]}
    if repo.lfs and name.endswith(".safetensors"):
        entry["lfs"] = {"oid": digest, "sha256": digest, "size": size, "pointerSize": 134}
    return entry
