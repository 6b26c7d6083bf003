"""A local server with the part of the Hub's API that downloads of checkpoints use."""

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
    """A repository.

    Attributes:
      commits: content of files by name, by commit.
      refs: commit by branch.
      stated_sha256: SHA-256 by file name that replaces the true one.
      token: token that a gated or private repository requires.
      private: whether requests without the token find no repository.
      lfs: whether the SHA-256 of shards is stated.
    """

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    stated_sha256: dict[str, str] = field(default_factory=dict)
    token: str = ""
    private: bool = False
    lfs: bool = True

    @classmethod
    def from_folder(cls, folder: Path, commit: str = "a" * 40) -> "Repo":
        """A repository with one commit: the files of a folder, and one that is not needed."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return cls({commit: files | {"pytorch_model.bin": b"not needed"}}, {"main": commit})

    def sha256(self, commit: str, name: str) -> str:
        computed = hashlib.sha256(self.commits[commit][name]).hexdigest()
        return self.stated_sha256.get(name, computed)


@dataclass
class Fault:
    """A fault for requests whose method and path match.

    Attributes:
      method: HTTP method.
      path: regular expression that is searched in the path.
      effect: a status, a share of the response after which the connection is closed, or a function
        to call in the middle of the response.
      times: number of requests with the fault.
    """

    method: str
    path: str
    effect: int | float | Callable[[], None]
    times: int = 10**6


class Hub(ThreadingHTTPServer):
    """The server; `requests` lists method, path and range of every request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str]] = []
        self.after_request: Callable[[str, str], None] = lambda method, path: None
        self.lock = Lock()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def fault(self, method: str, path: str) -> int | float | Callable[[], None] | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and method == fault.method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault.effect
        return None

    def downloads(self, suffix: str = "") -> list[str]:
        """The names of files that were requested, not a range of them, in order."""
        paths = [path for method, path, part in self.requests if method == "GET" and not part]
        names = [path.rpartition("/")[2] for path in paths if "/resolve/" in path]
        return [name for name in names if name.endswith(suffix)]


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a server without repositories while the block runs."""
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
            self.server.requests.append((self.command, path, self.headers.get("Range", "")))
        effect = self.server.fault(self.command, path)
        if isinstance(effect, int):
            self._send(effect, b"{}", {"Retry-After": "0"})
        else:
            self._serve(path, effect)
        self.server.after_request(self.command, path)

    def _serve(self, path: str, effect: float | Callable[[], None] | None) -> None:
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
        self._send(status, content, headers, effect)

    def _send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str],
        effect: float | Callable[[], None] | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        part = int((effect if isinstance(effect, float) else 0.5) * len(content))
        self.wfile.write(content[:part])
        if isinstance(effect, float):
            self.close_connection = True
            return
        if effect is not None:
            effect()
        with suppress(ConnectionError):  # the client can close the connection
            self.wfile.write(content[part:])


def _entry(repo: Repo, commit: str, name: str) -> dict:
    digest, size = repo.sha256(commit, name), len(repo.commits[commit][name])
    entry = {"type": "file", "path": name, "size": size, "oid": digest[:40]}
    if repo.lfs and name.endswith(".safetensors"):
        entry["lfs"] = {"oid": digest, "sha256": digest, "size": size, "pointerSize": 134}
    return entry
