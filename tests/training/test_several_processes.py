"""Training in several processes, compared with one process of four devices."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ovis_jax.training.reporting import read_metrics

pytestmark = pytest.mark.exhaustive

PROCESS = """
import sys
from functools import partial
sys.modules["torch"] = None  # tensorboardX would import it, in seconds, and does not need it
import jax
from ovis_jax.cli import main
from ovis_jax.training import trainer
from ovis_jax.training.checkpoints import TrainingCheckpoints

report = partial(print, file=sys.stdout, flush=True)  # of process 1, too
train_step, save = trainer.train_step, TrainingCheckpoints.save

def step_and_report(*arguments):
    state, metrics = train_step(*arguments)
    report("step", int(state.step))
    return state, metrics

step_and_report.lower = train_step.lower

def save_and_report(self, state, position):
    save(self, state, position)
    self.wait()
    report("saved", int(state.step))

trainer.train_step, TrainingCheckpoints.save = step_and_report, save_and_report
"""
FULL_DISK = """
def save_and_fail(self, state, position):
    if jax.process_index() == 1:
        raise OSError(28, "No space left on device", "checkpoints")
    save(self, state, position)

TrainingCheckpoints.save = save_and_fail
"""
MESH = "mesh.data=2", "mesh.model=2", "mesh.rules=tensor_fsdp"
SLOWLY = ("training.learning_rate=1e-4",)
"""A run whose losses stay above 1. Close to 0, the rounding of a loss is not relative to it."""


@pytest.fixture
def start(tmp_path):
    """Start the processes of a run, two by default, which share four devices; returns them.

    They are killed if a test fails.
    """
    started: list[subprocess.Popen] = []

    def start(config: Path, *overrides: str, script: str = "", folders=(None, None)):
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        devices = f"--xla_force_host_platform_device_count={4 // len(folders)}"
        flags = f"{os.environ['XLA_FLAGS']} {devices}"
        for index, folder in enumerate(folders):
            command = [sys.executable, "-c", f"{PROCESS}{script}\nmain()", "train", str(config)]
            options = [f"--num-processes={len(folders)}", f"--process-id={index}"]
            options.append(f"--coordinator=localhost:{port}")
            root = str(Path(__file__).parents[2])
            with (tmp_path / f"errors {index}.txt").open("w") as errors:
                process = subprocess.Popen(
                    [*command, *overrides, *options],
                    cwd=folder or root,
                    env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": root, "COLUMNS": "1000"},
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            started.append(process)
        return started[-len(folders) :]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def finish(processes) -> tuple[list[int], list[str]]:
    """Wait for processes; returns their exit codes and what they print."""
    outputs = [process.communicate()[0] for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.fixture
def errors(tmp_path):
    """What the processes print on stderr."""
    return lambda: [path.read_text() for path in sorted(tmp_path.glob("errors *.txt"))]


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    from golden_copies import read_tensors

    return read_tensors(folder)


@pytest.mark.parametrize(
    "options",
    [
        MESH,
        ("mesh.data=4", "mesh.model=1", "mesh.rules=fsdp"),
        ("mesh.data=2", "mesh.model=2", "mesh.rules=tensor"),
        ("mesh.data=4", "mesh.rules=tensor", "trainable=[]", "lora.rank=2"),
        (*MESH, "training.objective=dpo", "training.learning_rate=2e-6"),
    ],
    ids=["mixed", "data", "tensor", "adapters", "dpo"],
)
def test_several_processes_train_like_one(
    start, errors, train, write_config, write_dataset, tmp_path, golden, options
):
    """Fifty steps in two processes of two devices, and in four of one."""
    validation = write_dataset("validation.jsonl", 3)
    dataset = None
    if "training.objective=dpo" in options:
        image = str(golden / "images/square.png")
        row = {"image": image, "prompt": "<image>\nWho?", "chosen": "I.", "rejected": "It is he."}
        dataset = tmp_path / "pairs.jsonl"
        dataset.write_text("\n".join([json.dumps(row)] * 8))
    path = write_config(f'data.validation_files = ["{validation}"]', dataset=dataset)
    options = ("training.max_steps=50", "run.eval_steps=25", "run.save_steps=50", *options)
    options = (*SLOWLY, "run.logging_steps=1", "data.micro_batch_size=4", *options)
    assert train(path, *options)
    expected = read_metrics(tmp_path / "run")
    assert min(losses_of(tmp_path / "run")) > 0.2
    shutil.move(tmp_path / "run", tmp_path / "expected")
    (result,) = {"model", "adapters"} & {path.name for path in (tmp_path / "expected").iterdir()}
    weights = read_weights(tmp_path / "expected" / result)
    for processes in (2, 4):
        codes, outputs = finish(start(path, *options, folders=[None] * processes))
        assert codes == [0] * processes, errors()
        assert ["result: " in output for output in outputs] == [True] + [False] * (processes - 1)
        found = read_metrics(tmp_path / "run")
        for name in ("loss", "grad_norm", "accuracy"):
            values = [[line[name] for line in lines if name in line] for lines in (expected, found)]
            assert len(values[0]) == (2 if name == "accuracy" else 50)
            np.testing.assert_allclose(values[1], values[0], rtol=1e-5, err_msg=name)
        for key, value in read_weights(tmp_path / "run" / result).items():
            np.testing.assert_allclose(value, weights[key], atol=1e-4, err_msg=key)
        shutil.rmtree(tmp_path / "run")


def test_sigterm_to_one_stops_both_with_a_checkpoint(start, errors, write_config, tmp_path):
    processes = start(write_config(), *MESH, "training.max_steps=1000000", "run.save_steps=1000000")
    assert "step 3\n" in processes[1].stdout  # reads up to this line
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = finish(processes)
    assert codes == [4, 4], errors()
    (step,) = re.findall(r"^stopped at step (\d+);", outputs[0], re.M)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [step]
    for output in outputs:
        assert re.findall(r"^saved (\d+)$", output, re.M) == [step]


def test_killed_process_ends_the_other_and_one_process_resumes(
    start, train, write_config, tmp_path
):
    path, options = write_config(), (*MESH, *SLOWLY, "run.logging_steps=1", "run.save_steps=2")
    assert train(path, *options)
    expected = losses_of(tmp_path / "run")
    assert min(expected) > 1
    shutil.rmtree(tmp_path / "run")
    processes = start(path, *options)
    assert "saved 4\n" in processes[1].stdout
    processes[1].kill()
    codes, _ = finish(processes)
    assert codes[0] not in (0, 4) and codes[1] == -signal.SIGKILL
    assert not (tmp_path / "run/model").exists()
    assert train(path, *options)
    np.testing.assert_allclose(losses_of(tmp_path / "run"), expected, rtol=1e-5)


def test_two_processes_resume_a_run_of_one(start, errors, train, write_config, tmp_path, stop_at):
    path, options = write_config(), ("mesh.rules=fsdp", *SLOWLY, "run.logging_steps=1")
    assert train(path, *options, "mesh.data=2")
    expected = losses_of(tmp_path / "run")
    assert min(expected) > 1
    shutil.rmtree(tmp_path / "run")
    stop_at(3)
    assert not train(path, *options, "mesh.data=2")
    codes, outputs = finish(start(path, *options, "mesh.data=2", "mesh.model=2"))
    assert codes == [0, 0], errors()
    assert "resumed at step 3" in outputs[0]
    np.testing.assert_allclose(losses_of(tmp_path / "run"), expected, rtol=1e-5)


@pytest.fixture
def two_hosts(golden, tmp_path):
    """Folders with the same rows and images; in the second, one image is not readable."""
    folders = [tmp_path / "host 0", tmp_path / "host 1"]
    for folder in folders:
        folder.mkdir()
        rows = []
        for number, name in enumerate(("square", "tiny", "exact", "wide", "tall")):
            shutil.copy(golden / f"images/{name}.png", folder)
            turns = [
                {"from": "human", "value": f"<image>\nQuestion {number}?"},
                {"from": "gpt", "value": f"It is {name}."},
            ]
            rows.append(json.dumps({"image": f"{name}.png", "conversations": turns}))
        (folder / "rows.jsonl").write_text("\n".join(rows))
    (folders[1] / "wide.png").write_bytes(b"no image")
    return folders


@pytest.mark.parametrize("invalid_rows", ["error", "skip"])
def test_unreadable_row_on_one_host(start, errors, write_config, two_hosts, invalid_rows):
    files = "data.train_files=rows.jsonl"
    options = (*MESH, files, f"data.invalid_rows={invalid_rows}")
    codes, outputs = finish(start(write_config(), *options, folders=two_hosts))
    assert codes == [2, 2]
    if invalid_rows == "error":
        assert re.search(r"error: process 1: rows\.jsonl: row 4: .*wide\.png", errors()[0])
        assert re.search(r"error: rows\.jsonl: row 4: .*wide\.png", errors()[1])
    else:
        pattern = r"error: .*rows .* in process \d; .*rows .* in process \d"
        assert all(re.search(pattern, text) for text in errors())


def test_other_rows_on_one_host(start, errors, write_config, two_hosts):
    shutil.copy(two_hosts[0] / "wide.png", two_hosts[1])
    rows = two_hosts[1] / "rows.jsonl"
    rows.write_text(rows.read_text().replace("Question", "Riddle"))
    files = "data.train_files=rows.jsonl"
    codes, _ = finish(start(write_config(), *MESH, files, folders=two_hosts))
    assert codes == [2, 2]
    pattern = r"error: the start of the run: training rows 5 \(\w+\) in process \d"
    assert all(re.search(pattern, text) for text in errors())


def test_full_disk_on_one_host_ends_both(start, errors, write_config, tmp_path):
    codes, _ = finish(start(write_config(), *MESH, script=FULL_DISK))
    assert codes[0] != 0 and codes[1] == 3
    assert "No space left on device: checkpoints" in errors()[1]
    assert not (tmp_path / "run/model").exists()


def test_mesh_that_does_not_use_all_devices(start, errors, write_config, tmp_path):
    codes, _ = finish(start(write_config(), "mesh.data=2"))
    assert codes == [2, 2]
    expected = (
        "error: mesh: data 2 x model 1 is 2 devices, expected all 4 of the 2 processes (process 0"
        " has 2, process 1 has 2)"
    )
    assert all(expected in text for text in errors())
    assert not (tmp_path / "run").exists()
