"""Several processes: the reports before the start, and two that answer like one."""

import json
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ovis_jax import Inputs, OvisError, distributed, forward, generate, load
from ovis_jax.distributed import (
    check_same_number_of_devices,
    initialize_distributed,
    initialize_from_environment,
)

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def started(monkeypatch):
    """The arguments of calls to jax.distributed.initialize, which does nothing."""
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *arguments, **_: calls.append(arguments)
    )
    return calls


def start_together(indices, num_processes, timeout):
    """Start processes as threads; returns the error of each, or None, and the address."""
    address = f"localhost:{free_port()}"

    def start(index):
        try:
            initialize_distributed(address, num_processes, index, timeout=timeout)
        except OvisError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        return list(pool.map(start, indices)), address


def test_all_report_and_start(started):
    errors, address = start_together((2, 0, 1), 3, 30)
    assert errors == [None, None, None]
    assert sorted(started) == [(address, 3, index) for index in range(3)]


@pytest.mark.exhaustive
def test_every_process_learns_which_are_missing(started):
    errors, address = start_together((0, 2), 4, 5)
    assert errors[0] == errors[1] and not started
    assert errors[0].startswith("2 of 4 processes did not report within 5 s: 1, 3; ")
    assert address in errors[0]


def test_process_0_is_missing(started):
    (error,), address = start_together((1,), 2, 0.5)
    assert error.startswith(f"process 1: process 0 did not answer at {address} within 0.5 s")
    assert not started


def test_an_index_that_is_taken(started):
    errors, _ = start_together((0, 1, 1), 3, 30)
    # Process 0 tells all three, so that none waits for the timeout.
    assert errors == ["process_id 1 of 3 is taken or out of range"] * 3
    assert not started


def test_other_connections_do_not_count(started, monkeypatch):
    listening, create_server = threading.Event(), socket.create_server

    def create_and_report(address):
        server = create_server(address)
        listening.set()
        return server

    port = free_port()
    monkeypatch.setattr(socket, "create_server", create_and_report)
    thread = threading.Thread(target=initialize_distributed, args=(f"localhost:{port}", 2, 0))
    thread.start()
    assert listening.wait(60)
    for message in (b"GET / HTTP/1.1\n", b"1\n"):
        with socket.create_connection(("localhost", port)) as connection:
            connection.sendall(message)
            if message == b"1\n":
                assert connection.makefile().readline() == "\n"
    thread.join()
    assert len(started) == 1


def test_process_0_cannot_listen(started):
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"Address already in use.*{port}"):
            initialize_distributed(f"localhost:{port}", 2, 0)
    assert not started


@pytest.mark.parametrize(
    "address, index, message",
    [
        ("localhost", 0, "coordinator_address is 'localhost', expected host:port"),
        ("localhost:99999", 0, "coordinator_address is 'localhost:99999', expected host:port"),
        ("localhost:1234", 2, "process_id is 2, expected 0 to 1 for 2 processes"),
    ],
)
def test_invalid_arguments(started, address, index, message):
    with pytest.raises(OvisError, match=message):
        initialize_distributed(address, 2, index)
    assert not started


@pytest.mark.parametrize("port", [None, "1234"])
def test_leader_worker_set(started, monkeypatch, port):
    reported = []
    monkeypatch.setattr(distributed, "_report", lambda *arguments: reported.append(arguments) or "")
    for name, value in (("LEADER_ADDRESS", "leader"), ("GROUP_SIZE", "4"), ("WORKER_INDEX", "2")):
        monkeypatch.setenv(f"LWS_{name}", value)
    if port:
        monkeypatch.setenv("JAX_COORDINATOR_PORT", port)
    initialize_from_environment()
    assert started == [(f"leader:{port or 8476}", 4, 2)] and reported[0][2] == 2


def test_leader_worker_set_without_an_index(started, monkeypatch):
    monkeypatch.setenv("LWS_LEADER_ADDRESS", "leader")
    monkeypatch.setenv("LWS_GROUP_SIZE", "4")
    with pytest.raises(OvisError, match="LWS_WORKER_INDEX"):
        initialize_from_environment()
    assert not started


def test_no_environment_is_detected(monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(OvisError, match="JAX cannot join other processes: coordinator_address"):
        initialize_from_environment()


def test_different_numbers_of_devices(monkeypatch):
    devices = [SimpleNamespace(process_index=index) for index in (0, 0, 1)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(OvisError, match="process 0 has 2, process 1 has 1; give every process"):
        check_same_number_of_devices()


@pytest.mark.exhaustive
def test_two_processes_answer_like_one(shallow_checkpoint, tmp_path):
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
    # With FSDP each process reads and holds half of the sharded parameters and all others.
    for index in (0, 1):
        read = json.loads((tmp_path / f"read {index}.json").read_text())
        assert read["read"] == read["held"] < 0.55 * read["whole"]
