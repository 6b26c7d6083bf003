"""Options for several processes, and how a process ends after an error."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import typer

from ovis_jax import process_options
from ovis_jax.errors import DataError, OvisError
from ovis_jax.process_options import run_in_processes

ROOT = Path(__file__).parents[1]
FLAGS = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
TWO = (False, "localhost:1234", 2, 1)


class Ended(BaseException):
    pass


@pytest.fixture
def joined(monkeypatch):
    """The processes that are joined: nothing is started, and `os._exit` raises `Ended`."""
    calls = []

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(process_options, "initialize_distributed", lambda *a: calls.append(a))
    monkeypatch.setattr(process_options, "initialize_from_environment", lambda: calls.append(()))
    monkeypatch.setattr(os, "_exit", end)
    return calls


@pytest.mark.parametrize(
    "options, expected",
    [
        ((False, None, None, None), []),
        (TWO, [("localhost:1234", 2, 1)]),
        ((True, None, None, None), [()]),
    ],
)
def test_options(joined, options, expected):
    with run_in_processes(*options):
        assert joined == expected


@pytest.mark.parametrize(
    "options", [(True, "localhost:1234", 2, 1), (False, None, 2, None), (True, None, None, 0)]
)
def test_contradictory_options(joined, options):
    with pytest.raises(OvisError, match="either --distributed alone, or --coordinator"):
        with run_in_processes(*options):
            pass
    assert not joined


@pytest.mark.parametrize(
    "error, code, message",
    [
        (DataError("row 3 is broken"), 2, "error: row 3 is broken"),
        (OSError(28, "No space left", "run"), 3, "error: No space left: run"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("a fault"), 1, "ZeroDivisionError: a fault"),
        (
            jax.errors.JaxRuntimeError("UNKNOWN: reset by peer\nmore"),
            1,
            "error: process 0: UNKNOWN: reset by peer. If a connection was lost, another process",
        ),
    ],
)
def test_error_in_this_process_alone_ends_it_at_once(joined, capsys, error, code, message):
    with pytest.raises(Ended) as ended, run_in_processes(*TWO):
        raise error
    assert ended.value.args == (code,)
    assert message in capsys.readouterr().err


def test_error_that_all_processes_have_ends_the_command(joined, monkeypatch, capsys):
    monkeypatch.setattr(process_options, "is_agreed", lambda error: isinstance(error, DataError))
    with pytest.raises(SystemExit) as ended, run_in_processes(*TWO):
        raise DataError("row 3 is broken")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: row 3 is broken\n"


def run_command(count: int, *arguments: str) -> list[str]:
    """Run a command in some processes with one device each; returns what each prints."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "ovis_jax", *arguments, f"--tensor-parallel={count}"]
    several = [f"--num-processes={count}", f"--coordinator=localhost:{port}"] * (count > 1)
    running = [
        subprocess.Popen(
            [*command, *several, *[f"--process-id={index}"] * (count > 1)],
            env=os.environ | {"XLA_FLAGS": FLAGS},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    printed = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * count
    return printed


@pytest.mark.exhaustive
@pytest.mark.parametrize("choose_by", ["letter", "log_prob"])
def test_two_processes_evaluate_like_one(tmp_path, choose_by):
    colour = {"image": f"{ROOT}/examples/shapes.png", "question": "What colour is the diamond?"}
    word = {"image": f"{ROOT}/examples/word.png", "question": "Which word is in the picture?"}
    rows = [
        colour | {"answer": "The diamond is orange."},
        word | {"answer": "The word is WOLF."},
        colour | {"options": ["red", "orange", "blue"], "answer": "B"},
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)))
    results = []
    for count in (1, 2):
        output = tmp_path / f"results of {count}.jsonl"
        options = "--max-new-tokens=8", "--batch-size=2", f"--choose-by={choose_by}"
        printed = run_command(count, "eval", str(questions), f"--output={output}", *options)
        assert ["accuracy" in text for text in printed] == [True, False][:count]
        results.append(output.read_text().splitlines()[1:])
    assert len(results[0]) == 3 and results[0] == results[1]


@pytest.mark.exhaustive
def test_two_processes_generate_like_one():
    options = "generate", "--image=examples/shapes.png", "--prompt=Describe.", "--temperature=1"
    (expected,), (found, other) = (run_command(count, *options) for count in (1, 2))
    without_messages = [line for line in found.splitlines() if "Gloo" not in line]
    assert without_messages == expected.splitlines() != []
    assert expected not in other


def test_one_process_raises_as_usual(joined):
    with pytest.raises(typer.Exit), run_in_processes(False, None, None, None):
        raise typer.Exit(4)
