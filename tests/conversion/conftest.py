import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from golden_copies import CHECKPOINTS, GOLDEN, read_files
from hub_server import Hub, hub_server

from ovis_jax import cli
from ovis_jax.conversion.from_hf import convert_from_hf

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "secret" * 5


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[str, Path]:
    """Both golden checkpoints, converted; not to be changed."""
    folder = tmp_path_factory.mktemp("converted")
    for name in CHECKPOINTS:
        convert_from_hf(GOLDEN / name, folder / name)
    return {name: folder / name for name in CHECKPOINTS}


@pytest.fixture
def export(tmp_path, monkeypatch, capfd) -> Callable[..., SimpleNamespace]:
    """Run `ovis-jax export` in this process."""
    monkeypatch.chdir(tmp_path)

    def export(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["ovis-jax", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        stdout, stderr = capfd.readouterr()
        return SimpleNamespace(exit_code=exited.value.code, stdout=stdout, stderr=stderr)

    return export


@pytest.fixture(scope="session")
def expected_files(tmp_path_factory) -> dict[str, bytes]:
    """The files of the converted sharded golden checkpoint."""
    folder = tmp_path_factory.mktemp("expected") / "out"
    convert_from_hf(GOLDEN / "tiny-bf16-sharded", folder)
    return read_files(folder)


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """A server with the Hub's API."""
    with hub_server() as server:
        yield server


@pytest.fixture(scope="session")
def hf_home(tmp_path_factory) -> Path:
    """The folder of huggingface_hub's cache."""
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="session")
def token() -> str:
    """A token that must never be printed."""
    return TOKEN


@dataclass
class CommandResult:
    """Exit code and output of a command."""

    code: int
    output: str


class CommandRunner:
    """Runs `convert` in forks of a server process; `child` is the id of the current fork."""

    def __init__(self, server: subprocess.Popen[str], folder: Path):
        self._server = server
        self._output = folder / "printed"
        self.child = 0

    def __call__(
        self, *arguments: object, fault: tuple[str, str] | None = None, **environment: str
    ) -> CommandResult:
        """Run the command with further environment variables; see `fork_server` for `fault`."""
        self._output.unlink(missing_ok=True)
        request = {"arguments": [*map(str, arguments)], "environment": environment, "fault": fault}
        requests, replies = self._server.stdin, self._server.stdout
        assert requests is not None and replies is not None
        requests.write(json.dumps(request | {"output": str(self._output)}) + "\n")
        requests.flush()
        self.child = int(replies.readline())
        code = int(replies.readline())
        output = self._output.read_text()
        assert "Traceback" not in output and "secret" not in output, output
        return CommandResult(code, output)


@pytest.fixture(scope="session")
def fork_server(hub, hf_home) -> Iterator[subprocess.Popen[str]]:
    """The process that forks; its Hub is the test server."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(hf_home)}
    environment["SSL_CERT_DIR"] = str(hf_home)  # reading all certificates is slow
    command = [sys.executable, "-m", "tests.conversion.fork_server"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(fork_server, tmp_path) -> CommandRunner:
    """Run the command; its output must not contain the token or a traceback."""
    return CommandRunner(fork_server, tmp_path)
