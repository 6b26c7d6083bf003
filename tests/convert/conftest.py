import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from golden_copies import CHECKPOINTS, GOLDEN, read_files
from hub_server import Hub, hub_server

from convert.from_hf import convert

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "secret" * 5


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[str, Path]:
    """Both golden folders as from_hf makes them; not to be changed."""
    place = tmp_path_factory.mktemp("converted")
    for name in CHECKPOINTS:
        convert(GOLDEN / name, place / name)
    return {name: place / name for name in CHECKPOINTS}


@pytest.fixture(scope="session")
def alone(tmp_path_factory) -> dict[str, bytes]:
    """The files that the sharded golden folder becomes."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    convert(GOLDEN / "tiny-bf16-sharded", folder)
    return read_files(folder)


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """A server that speaks the Hub's API."""
    with hub_server() as server:
        yield server


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """Where huggingface_hub has its cache."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def token() -> str:
    """A token that must never be printed."""
    return TOKEN


@dataclass
class Ended:
    """How a command ended, and what it printed."""

    code: int
    said: str


class Run:
    """Runs convert.from_hf in forks of `process`; `child` is the one that runs."""

    def __init__(self, process: subprocess.Popen[str], folder: Path):
        self._process = process
        self._output = folder / "printed"
        self.child = 0

    def __call__(
        self, *arguments: object, at: tuple[str, str] | None = None, **environment: str
    ) -> Ended:
        """Run it with arguments and more environment; see `forked` for `at`."""
        self._output.unlink(missing_ok=True)
        what = {"arguments": [*map(str, arguments)], "environment": environment, "at": at}
        talk, answers = self._process.stdin, self._process.stdout
        assert talk is not None and answers is not None
        talk.write(json.dumps(what | {"output": str(self._output)}) + "\n")
        talk.flush()
        self.child = int(answers.readline())
        code = int(answers.readline())
        said = self._output.read_text()
        assert "Traceback" not in said and "secret" not in said, said
        return Ended(code, said)


@pytest.fixture(scope="session")
def forks(hub, home) -> Iterator[subprocess.Popen[str]]:
    """The process that forks, whose Hub is the server."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home)}
    environment["SSL_CERT_DIR"] = str(home)  # reading the certificates of all would take a while
    command = [sys.executable, "-m", "tests.convert.forked"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(forks, tmp_path) -> Run:
    """Run the command; what it prints is in `tmp_path`, and has no token and no stack trace."""
    return Run(forks, tmp_path)
