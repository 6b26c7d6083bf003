"""Training runs: results, resuming after any interruption, and full disks."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from compilations import compilations
from flax.traverse_util import flatten_dict
from golden_copies import read_tensors, same_bits
from rich.console import Console
from shallow import copy_shallow

from ovis_jax.errors import DataError, OvisError, TrainingError
from ovis_jax.loading import load
from ovis_jax.model.ovis import forward
from ovis_jax.training.checkpoints import TrainingCheckpoints
from ovis_jax.training.reporting import read_metrics
from ovis_jax.training.trainer import Trainer

STEPS = 12


@pytest.mark.slow
def test_run_trains_validates_and_writes_a_model(
    train, write_config, write_dataset, tmp_path, shallow_checkpoint
):
    validation = write_dataset("validation.jsonl", 5)
    # With a decaying rate the accuracy does not depend on rounding on different processors.
    decay = "training.decay_steps = 30"
    files = f'data.validation_files = ["{validation}"]'
    rows = write_dataset("train.jsonl", 12)
    path = write_config(files, "run.eval_steps = 30", decay, dataset=rows)
    assert train(path, "training.max_steps=60")
    lines = read_metrics(tmp_path / "run")
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert sorted(losses) == list(range(2, 61, 2))
    assert losses[2] > 1 and losses[60] < 0.1
    assert all(line["tflops_per_device"] > 0 for line in lines if "loss" in line)
    assert not any("mfu" in line for line in lines)  # the peak of a CPU is unknown
    validated = [line for line in lines if "accuracy" in line]
    assert [line["step"] for line in validated] == [30, 60]
    assert validated[-1]["accuracy"] == 1.0
    kinds = {"all", "exact", "square", "tall", "tiny", "wide"}
    assert validated[-1]["accuracy_by_kind"].keys() == kinds
    kept = sorted(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir())
    assert kept == [56, 60]
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    (events,) = (tmp_path / "run/tensorboard").iterdir()
    assert b"accuracy_by_kind/square" in events.read_bytes()
    assert b"samples/1" in events.read_bytes() and b"It is square." in events.read_bytes()

    ovis = load(tmp_path / "run/model")
    before = flatten_dict(load(shallow_checkpoint).params, sep="/")
    for name, value in flatten_dict(ovis.params, sep="/").items():
        changed = not np.array_equal(value, before[name])
        assert changed == name.startswith(("decoder", "visual_embedding")), name
        assert value.dtype == before[name].dtype
    assert train(path, "training.max_steps=60")  # nothing remains to do


def final_params(folder):
    return read_tensors(folder / "run/model")


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert all(same_bits(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_stopped_run_resumes_to_the_same_bits(train, write_config, tmp_path, stop_at, accumulation):
    path = write_config(f"data.gradient_accumulation_steps = {accumulation}")
    assert train(path)
    expected = final_params(tmp_path)
    expected_losses = [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "run")]
    shutil.rmtree(tmp_path / "run")

    finished = stop_at(3, 4, 9)
    assert [train(path) for _ in range(4)] == [False, False, False, True]
    assert len(finished) == STEPS
    assert_same_bits(final_params(tmp_path), expected)
    losses = [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "run")]
    assert losses == expected_losses
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.exhaustive
def test_stop_after_a_save_repeats_no_step(train, write_config, tmp_path, monkeypatch, stop_at):
    path = write_config(f'data.validation_files = ["{tmp_path / "train.jsonl"}"]')
    finished = stop_at()

    validation_answers = Trainer._validation_answers

    def answer_and_stop(*arguments):
        answers = validation_answers(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return answers

    monkeypatch.setattr(Trainer, "_validation_answers", answer_and_stop)
    overrides = ("run.eval_steps=3", "training.max_steps=6")  # step 3 is not a multiple of 4
    assert [train(path, *overrides) for _ in range(2)] == [False, True]
    assert len(finished) == 6


TRAIN_AND_REPORT_SAVES = """
import sys
sys.modules["torch"] = None  # tensorboardX would import it, in seconds, and does not need it
from ovis_jax.cli import main
from ovis_jax.training.checkpoints import TrainingCheckpoints

save = TrainingCheckpoints.save

def save_and_report(self, state, position):
    save(self, state, position)  # which writes the files in another thread
    print("saving", int(state.step), flush=True)

TrainingCheckpoints.save = save_and_report
main()
"""


@pytest.mark.exhaustive
def test_killed_run_resumes_to_the_same_bits(write_config, tmp_path):
    path = write_config()
    command = [sys.executable, "-c", TRAIN_AND_REPORT_SAVES, "train", str(path), "run.save_steps=2"]
    subprocess.run(command, check=True)
    expected = final_params(tmp_path)
    shutil.rmtree(tmp_path / "run")
    for step in (2, 6):  # while its checkpoint is written
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert f"saving {step}\n" in process.stdout  # reads up to this line
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "run/model").exists()
    subprocess.run(command, check=True)
    assert_same_bits(final_params(tmp_path), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [[], pytest.param(["mesh.data=2", "mesh.rules=fsdp"], marks=pytest.mark.exhaustive)],
)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_all_shapes_are_compiled_before_the_first_step(
    train, write_config, write_dataset, tmp_path, monkeypatch, overrides, accumulation
):
    """Only the first step compiles the optimizer; an epoch has micro-batches of several shapes."""
    dataset = write_dataset("shapes.jsonl", 15)
    train_step, counts, shapes = Trainer._train_step, [], set()

    def count_compilations(self, micro_batches):
        micro_batches = list(micro_batches)
        shapes.update(batch.inputs.pixels.shape for batch in micro_batches)
        with compilations() as found:
            result = jax.block_until_ready(train_step(self, micro_batches))
        counts.append(len(found))
        return result

    monkeypatch.setattr(Trainer, "_train_step", count_compilations)
    options = (
        "data.max_partition=9",
        f"data.gradient_accumulation_steps={accumulation}",
        "data.micro_batch_size=2",
    )
    output = io.StringIO()
    console = Console(file=output, width=200)
    path = write_config(dataset=dataset)
    assert train(path, *options, *overrides, "training.max_steps=9", console=console)
    assert (
        len(shapes) > 1 and f"compiled {len(shapes)} shapes of micro-batches" in output.getvalue()
    )
    assert counts[0] <= 2 and counts[1:] == [0] * 8


@pytest.mark.exhaustive
def test_lora_run_writes_adapters_only(train, write_config, tmp_path, shallow_checkpoint):
    path = write_config(trainable=False)
    assert train(path, "lora.rank=2", "lora.alpha=4")
    base = load(shallow_checkpoint)
    adapted = load(shallow_checkpoint, adapters=tmp_path / "run/adapters")
    inputs = base.processor(["Hi"])
    logits = [np.asarray(forward(o.model, o.params, inputs)) for o in (base, adapted)]
    assert np.abs(logits[0] - logits[1]).max() > 0.1
    assert not (tmp_path / "run/model").exists()


@pytest.mark.exhaustive
def test_dpo_run(train, write_config, tmp_path, golden):
    image = str(golden / "images/square.png")
    row = {"image": image, "prompt": "<image>\nWho?", "chosen": "I.", "rejected": "It is he."}
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join([json.dumps(row)] * 4))
    path = write_config("training.objective = 'dpo'", dataset=pairs)
    assert train(path, "training.learning_rate=1e-3")
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert losses[0] < np.log(2) + 1e-3 and losses[-1] < 0.5 * losses[0]


@pytest.fixture
def gumbel_checkpoint(tmp_path) -> Path:
    """The shallow checkpoint, as a model that samples its visual words."""
    folder = copy_shallow(tmp_path / "gumbel")
    config = json.loads((folder / "config.json").read_text())
    config["visual_tokenizer_config"]["tokenize_function"] = "gumbel_argmax"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.exhaustive
def test_sampled_visual_words_are_the_same_after_resuming(
    train, write_config, tmp_path, stop_at, gumbel_checkpoint
):
    path = write_config('trainable = ["visual_tokenizer"]', trainable=False)
    overrides = (f"model={gumbel_checkpoint}", "training.max_steps=4", "run.logging_steps=1")
    runs = []
    for seed, stops in ((42, ()), (42, (2,)), (43, ())):
        stop_at(*stops)
        while not train(path, *overrides, f"run.seed={seed}"):
            pass
        losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
        runs.append((losses, final_params(tmp_path)))
        shutil.rmtree(tmp_path / "run")
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert_same_bits(runs[0][1], runs[1][1])


@pytest.mark.exhaustive
@pytest.mark.parametrize("accumulation", [1, 2])
def test_dpo_samples_the_same_visual_words_as_the_reference(
    train, write_config, tmp_path, golden, gumbel_checkpoint, accumulation
):
    """While the model equals the reference model, the loss is ln 2."""
    image = str(golden / "images/square.png")
    row = {"image": image, "prompt": "<image>\nWho?", "chosen": "I.", "rejected": "It is he."}
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join([json.dumps(row)] * 4))
    path = write_config("training.objective = 'dpo'", dataset=pairs)
    options = ("training.learning_rate=1e-12", "training.max_steps=3", "run.logging_steps=1")
    accumulates = f"data.gradient_accumulation_steps={accumulation}"
    assert train(path, f"model={gumbel_checkpoint}", accumulates, *options)
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    np.testing.assert_allclose(losses, [np.log(2)] * 3, atol=1e-5)


@pytest.mark.exhaustive
def test_run_on_a_mesh_has_the_same_losses(train, write_config, tmp_path):
    losses = []
    for overrides in ([], ["mesh.data=2", "mesh.rules=fsdp"]):
        path = write_config()
        assert train(path, "training.max_steps=4", *overrides)
        losses.append([line["loss"] for line in read_metrics(tmp_path / "run")])
        shutil.rmtree(tmp_path / "run")
    assert jax.device_count() == 8
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize(
    "overrides, error, message",
    [
        (["mesh.data=16"], OvisError, "data 16 x model 1 needs 16 devices"),
        (
            ["mesh.data=4"],
            TrainingError,
            "data.micro_batch_size is 2, expected a multiple of the size of mesh axis data, 4",
        ),
        (
            ["training.objective=dpo"],
            DataError,
            "row 1: training.objective=dpo needs rows with prompt, chosen and rejected",
        ),
        (["data.validation_files=none.json"], DataError, "none.json cannot be read"),
    ],
)
def test_run_that_cannot_start_writes_nothing(
    train, write_config, tmp_path, overrides, error, message
):
    with pytest.raises(error, match=re.escape(message)):
        train(write_config(), *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_full_disk_keeps_the_latest_checkpoint(train, write_config, tmp_path, monkeypatch):
    path = write_config()
    real_save, saved = TrainingCheckpoints.save, []

    def save(self, state, position):
        if int(state.step) > 4:
            usage = shutil.disk_usage(tmp_path)._replace(free=1000)
            monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        real_save(self, state, position)
        saved.append(int(state.step))

    monkeypatch.setattr(TrainingCheckpoints, "save", save)
    with pytest.raises(OSError, match=r"0\.00 GB"):
        train(path)
    assert saved == [4]
    monkeypatch.undo()
    assert train(path)
    assert (tmp_path / "run/model").exists()


@pytest.mark.exhaustive
def test_failed_write_keeps_the_latest_checkpoint(train, write_config, tmp_path, stop_at):
    path = write_config()
    assert train(path)
    expected = final_params(tmp_path)
    shutil.rmtree(tmp_path / "run")
    stop_at(2)
    assert not train(path)
    # A process of its own, in which no file can exceed 100 blocks.
    limited = ["sh", "-c", 'ulimit -f 100; exec "$0" "$@"']
    ended = subprocess.run(
        [*limited, sys.executable, "-m", "ovis_jax", "train", str(path)],
        env=os.environ | {"COLUMNS": "1000", "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 3
    message = "could not be written.*the latest complete one is of step 2"
    assert re.search(message, ended.stderr)
    assert train(path)
    assert_same_bits(final_params(tmp_path), expected)
