"""Several processes: the roll call before the start, and two that answer as one does."""

import json
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from ovis_jax import Inputs, OvisError, forward, generate, load
from ovis_jax.processes import start_processes

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def started(monkeypatch):
    """What jax.distributed was told to start; it starts nothing."""
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *arguments, **_: calls.append(arguments)
    )
    return calls


def together(indices, count, timeout):
    """Start processes at once, as threads; the error of each, or None."""
    address = f"localhost:{free_port()}"

    def start(index):
        try:
            start_processes(address, count, index, timeout=timeout)
        except OvisError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        return list(pool.map(start, indices)), address


def test_all_report_and_start(started):
    errors, address = together((2, 0, 1), 3, 30)
    assert errors == [None, None, None]
    assert sorted(started) == [(address, 3, index) for index in range(3)]


def test_everybody_hears_who_is_missing(started):
    errors, address = together((0, 2), 4, 5)
    expected = (
        f"after 5 s 2 of 4 processes are missing: 1, 3; start each with the address {address}"
        " and an index of its own"
    )
    assert errors == [expected, expected] and not started


def test_process_0_is_missing(started):
    (error,), address = together((1,), 2, 0.5)
    assert error.startswith(f"process 1: process 0 did not answer at {address} within 0.5 s")
    assert not started


def test_an_index_that_is_taken(started):
    errors, _ = together((0, 1, 1), 3, 30)
    # All three hear it from process 0, none waits in vain.
    assert errors == ["a process reported as 1 of 3, which is taken or out of range"] * 3
    assert not started


def test_a_stranger_at_the_port_is_not_counted(started):
    port = free_port()
    ends = threading.Thread(target=start_processes, args=(f"localhost:{port}", 2, 0))
    ends.start()
    for message in (b"GET / HTTP/1.1\n", b"1\n"):
        while True:
            try:
                call = socket.create_connection(("localhost", port))
                break
            except ConnectionRefusedError:
                continue
        call.sendall(message)
        if message == b"1\n":
            assert json.loads(call.makefile().readline()) == ""
        call.close()
    ends.join()
    assert len(started) == 1


@pytest.mark.parametrize(
    "address, index, complaint",
    [
        ("localhost", 0, "address is 'localhost', expected host:port of process 0"),
        ("localhost:99999", 0, "expected host:port"),
        ("localhost:1234", 2, "index is 2, expected 0 to 1 for 2 processes"),
    ],
)
def test_what_cannot_be_started(started, address, index, complaint):
    with pytest.raises(OvisError, match=complaint):
        start_processes(address, 2, index)
    assert not started


def test_two_processes_answer_as_one(shallow_checkpoint, tmp_path):
    address = f"localhost:{free_port()}"
    command = [sys.executable, "-m", "tests.two_processes", address]
    running = [
        subprocess.Popen([*command, str(index), str(shallow_checkpoint), str(tmp_path)], cwd=ROOT)
        for index in (0, 1)
    ]
    assert [process.wait() for process in running] == [0, 0]
    ovis = load(shallow_checkpoint)
    found = np.load(tmp_path / "found.npz")
    inputs = Inputs(found["tokens"], found["positions"], found["pixels"])
    expected = generate(ovis.model, ovis.params, inputs, max_new_tokens=8, eos_ids=())
    logits = np.asarray(forward(ovis.model, ovis.params, inputs))
    for name in ("tensor", "tensor_fsdp"):
        assert found[f"{name} answer"].tolist() == expected.tokens.tolist()
        largest = np.abs(logits).max()
        np.testing.assert_allclose(found[f"{name} logits"], logits, atol=1e-4 * largest)
    # Under FSDP each process holds, and has read, half of what is cut and all of what is whole.
    for index in (0, 1):
        read = json.loads((tmp_path / f"read {index}.json").read_text())
        assert read["read"] == read["held"] < 0.55 * read["whole"]
