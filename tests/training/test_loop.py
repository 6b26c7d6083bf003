"""Runs from a config to a model: results, resuming after any end, and what stops a run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_copies import read_tensors, same_bits
from rich.console import Console

from ovis_jax.errors import ConfigError, DataError, OvisError
from ovis_jax.loading import load
from ovis_jax.model.ovis import forward
from ovis_jax.training import loop
from ovis_jax.training.config import read_config
from ovis_jax.training.metrics import read_metrics
from ovis_jax.training.store import Store

STEPS = 12
QUIET = Console(quiet=True)


def run(path, *overrides: str) -> bool:
    return loop.train(read_config(path, overrides), QUIET)


def test_a_run_learns_and_leaves_a_model(write_config, write_rows, tmp_path, shallow_checkpoint):
    held_out = write_rows("validation.jsonl", 5)
    # The rate falls to 0, so that no processor's last bit decides what the rarest row has learned.
    decay = "optimizer.decay_steps = 30"
    path = write_config(f'data.validation = ["{held_out}"]', "run.evaluate_every = 30", decay)
    assert run(path, "run.steps=60")
    lines = read_metrics(tmp_path / "run")
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert sorted(losses) == list(range(2, 61, 2))
    assert losses[2] > 1 and losses[60] < 0.1
    scored = [line for line in lines if "accuracy" in line]
    assert [line["step"] for line in scored] == [30, 60]
    assert scored[-1]["accuracy"] == 1.0
    assert scored[-1]["accuracy_by_kind"].keys() == {
        "all",
        "exact",
        "square",
        "tall",
        "tiny",
        "wide",
    }
    kept = sorted(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir())
    assert kept == [56, 60]
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    (events,) = (tmp_path / "run/tensorboard").iterdir()
    assert b"accuracy_by_kind/square" in events.read_bytes()

    ovis = load(tmp_path / "run/model")
    before = flatten_dict(load(shallow_checkpoint).params, sep="/")
    for name, value in flatten_dict(ovis.params, sep="/").items():
        changed = not np.array_equal(value, before[name])
        assert changed == name.startswith(("decoder", "visual_embedding")), name
        assert value.dtype == before[name].dtype
    assert run(path, "run.steps=60")  # nothing is left to do


def final_params(folder):
    return read_tensors(folder / "run/model")


def assert_same_end(one, other):
    assert one.keys() == other.keys()
    assert all(same_bits(one[key], other[key]) for key in one)


def test_asked_to_stop_it_goes_on_to_the_same_end(write_config, tmp_path, ask_to_stop):
    path = write_config()
    assert run(path)
    expected = final_params(tmp_path)
    expected_losses = [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "run")]
    shutil.rmtree(tmp_path / "run")

    steps_made = ask_to_stop(3, 4, 9)
    assert [run(path) for _ in range(4)] == [False, False, False, True]
    assert len(steps_made) == STEPS
    assert_same_end(final_params(tmp_path), expected)
    losses = [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "run")]
    assert losses == expected_losses
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_asked_to_stop_behind_a_save_no_step_is_made_twice(
    write_config, tmp_path, monkeypatch, ask_to_stop
):
    path = write_config("data.validation = ['none.json']")
    path.write_text(path.read_text().replace("none.json", str(tmp_path / "train.jsonl")))
    steps_made = ask_to_stop()

    def evaluate(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"all": 1.0}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    overrides = ("run.evaluate_every=3", "run.steps=6")  # a checkpoint is due at 4 alone
    assert [run(path, *overrides) for _ in range(2)] == [False, True]
    assert len(steps_made) == 6


def test_killed_at_any_moment_it_goes_on_to_the_same_end(write_config, tmp_path):
    path = write_config()
    command = [sys.executable, "-m", "ovis_jax", "train", str(path), "run.save_every=2"]
    assert subprocess.run(command, check=True).returncode == 0
    expected = final_params(tmp_path)
    shutil.rmtree(tmp_path / "run")
    metrics = tmp_path / "run/metrics.jsonl"
    for last in (1, 3):  # while the checkpoints of step 2 and of a later step are being written
        process = subprocess.Popen(command)
        while process.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") >= last:
                process.kill()
            time.sleep(0.01)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "run/model").exists()
    subprocess.run(command, check=True)
    assert_same_end(final_params(tmp_path), expected)


def test_adapters_are_left_apart(write_config, tmp_path, shallow_checkpoint):
    path = write_config()
    path.write_text(path.read_text().replace("learn.parts", "#"))
    assert run(path, "learn.lora.rank=2", "learn.lora.scale=2.0")
    plain = load(shallow_checkpoint)
    adapted = load(shallow_checkpoint, adapters=tmp_path / "run/adapters")
    inputs = plain.processor(["Hi"])
    logits = [np.asarray(forward(o.model, o.params, inputs)) for o in (plain, adapted)]
    assert np.abs(logits[0] - logits[1]).max() > 0.1
    assert not (tmp_path / "run/model").exists()


def test_preference_pairs(write_config, tmp_path, golden):
    image = str(golden / "images/square.png")
    row = {"image": image, "prompt": "<image>\nWho?", "chosen": "I.", "rejected": "It is he."}
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("\n".join([json.dumps(row)] * 4))
    path = write_config("learn.objective = 'dpo'", rows=rows)
    assert run(path, "optimizer.learning_rate=1e-3")
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert losses[0] < np.log(2) + 1e-3 and losses[-1] < 0.5 * losses[0]


def test_a_mesh_gives_the_same_losses(write_config, tmp_path):
    losses = []
    for overrides in ([], ["mesh.data=2", "mesh.rules=fsdp"]):
        path = write_config()
        assert run(path, "run.steps=4", *overrides)
        losses.append([line["loss"] for line in read_metrics(tmp_path / "run")])
        shutil.rmtree(tmp_path / "run")
    assert jax.device_count() == 8
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize(
    "overrides, error, complaint",
    [
        (["mesh.data=16"], OvisError, "16 x model 1 is 16 devices, and JAX has 8"),
        (["mesh.data=4"], ConfigError, "data.rows is 2, which mesh axis data of size 4"),
        (["learn.objective=dpo"], DataError, "row 1: learn.objective dpo needs prompt, chosen"),
        (["data.validation=['none.json']"], DataError, "none.json cannot be read"),
    ],
)
def test_what_cannot_begin_leaves_nothing(write_config, tmp_path, overrides, error, complaint):
    with pytest.raises(error, match=re.escape(complaint)):
        run(write_config(), *overrides)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_last_checkpoint(write_config, tmp_path, monkeypatch):
    path = write_config()
    real_save, saved = Store.save, []

    def save(self, state, position):
        if int(state.step) > 4:
            usage = shutil.disk_usage(tmp_path)._replace(free=1000)
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        real_save(self, state, position)
        saved.append(int(state.step))

    monkeypatch.setattr(Store, "save", save)
    with pytest.raises(OSError, match="are needed and 0.00 GB are free; make room in"):
        run(path)
    assert saved == [4]
    monkeypatch.undo()
    assert run(path)
    assert (tmp_path / "run/model").exists()


def test_a_write_that_fails_leaves_the_last_checkpoint(write_config, tmp_path, ask_to_stop):
    path = write_config()
    assert run(path)
    expected = final_params(tmp_path)
    shutil.rmtree(tmp_path / "run")
    ask_to_stop(2)
    assert not run(path)
    # In a process of its own, where no file may grow beyond 100 blocks.
    limited = ["sh", "-c", 'ulimit -f 100; exec "$0" "$@"']
    ended = subprocess.run(
        [*limited, sys.executable, "-m", "ovis_jax", "train", str(path)],
        env=os.environ | {"COLUMNS": "1000", "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert re.search("could not be written.*the last good one is of step 2", ended.stderr)
    assert run(path)
    assert_same_end(final_params(tmp_path), expected)
