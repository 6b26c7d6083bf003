"""Training runs with invalid rows, changed settings, missing checkpoints or diverging losses."""

import io
import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
from rich.console import Console

from ovis_jax.checkpoint.file_io import write_json
from ovis_jax.errors import CheckpointError, DataError, TrainingError
from ovis_jax.training import trainer
from ovis_jax.training.output_lock import lock_output
from ovis_jax.training.reporting import read_metrics

TURNS = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "I."}]
SHORT = ("training.max_steps=4", "run.save_steps=2")


@pytest.fixture
def train_output(train):
    """Complete a run, and return what it prints."""

    def output(path, *overrides: str) -> str:
        console = Console(record=True, width=400, file=io.StringIO())
        assert train(path, *overrides, console=console)
        return console.export_text()

    return output


def validated_steps(folder) -> list[int]:
    return [line["step"] for line in read_metrics(folder) if "accuracy" in line]


@pytest.mark.slow
def test_invalid_training_rows(train, train_output, write_config, write_dataset):
    no_answer = {"conversations": [{"from": "human", "value": "Who?"}]}
    no_image = {"image": "gone.png", "conversations": TURNS}
    path = write_config(dataset=write_dataset("bad.jsonl", 6, no_answer, no_image))
    message = r'bad\.jsonl: row 8: no turn from gpt.*data\.invalid_rows="skip"'
    with pytest.raises(DataError, match=message):
        train(path)
    output = train_output(path, "data.invalid_rows=skip")
    assert "row 8: no turn from gpt" in output and re.search(r"row 9: .*gone\.png", output)
    assert "rows skipped: 2" in output


@pytest.mark.slow
def test_invalid_validation_rows(train, train_output, write_config, write_dataset, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    too_long = [{"from": "human", "value": "Who? " * 20_000}, TURNS[1]]
    no_answer = {"conversations": [TURNS[1], {"from": "human", "value": "Who?"}]}
    gone = {"image": "gone.png", "conversations": TURNS}
    rows = [no_answer, gone, {"image": "broken.png", "conversations": TURNS}]
    validation = write_dataset("held.jsonl", 2, *rows, {"conversations": too_long})
    path = write_config(f'data.validation_files = ["{validation}"]')
    message = r"row 4: the last turn is not from gpt.*and 1 more invalid row\)"
    with pytest.raises(DataError, match=message):
        train(path, *SHORT)
    assert not (tmp_path / "run").exists()
    output = train_output(path, *SHORT, "data.invalid_rows=skip", "run.eval_steps=2")
    assert "row 4: the last turn is not from gpt" in output
    assert re.search(r"row 5: image file .*gone\.png does not exist", output)
    assert re.search(r"row 6: .*broken\.png", output) and "positions long" in output
    assert output.count("skipped: ") == 5 and "rows skipped: 4" in output
    assert output.count("exact match on validation rows") == 2
    assert [output.count(f"step {n}: saving a checkpoint") for n in (2, 4)] == [1, 1]
    samples = [json.loads(x) for x in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    # The rows are spread over all seven, three of which are left out.
    assert [(x["step"], x["row"].partition(": ")[2]) for x in samples] == [
        *((step, f"row {n}") for step in (2, 4) for n in (1, 3))
    ]
    assert samples[0]["question"] == "<image>\nQuestion 0?"
    assert samples[0]["expected"] == "It is square."
    assert output.count('"<image>\\nQuestion 0?": expected "It is square.", generated "') == 2
    assert (tmp_path / "run/model").exists()


@pytest.mark.slow
def test_no_valid_validation_row(train_output, write_config, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    validation = tmp_path / "held.jsonl"
    validation.write_text(json.dumps({"image": "broken.png", "conversations": TURNS}))
    path = write_config(f'data.validation_files = ["{validation}"]')
    output = train_output(path, *SHORT, "data.invalid_rows=skip")
    assert "rows skipped: 1" in output and not validated_steps(tmp_path / "run")


@pytest.mark.exhaustive
def test_stopped_validation_is_repeated_on_resuming(
    train, write_config, write_dataset, tmp_path, monkeypatch, stop_at
):
    path = write_config(f'data.validation_files = ["{write_dataset("held.jsonl", 2)}"]')
    overrides = (*SHORT, "run.save_steps=4", "run.eval_steps=1")
    answer_rows, answers, stops = trainer.answer_rows, [], [True, False, False, False, False]

    def answer_and_stop(*arguments, **options):
        for number, answer in enumerate(answer_rows(*arguments, **options)):
            if number == 0 and stops.pop(0):
                os.kill(os.getpid(), signal.SIGTERM)
            answers.append(answer)
            yield answer

    monkeypatch.setattr(trainer, "answer_rows", answer_and_stop)
    stop_at(2)
    assert not train(path, *overrides)  # stops during the validation of step 1
    assert len(answers) == 1 and not validated_steps(tmp_path / "run")
    assert not train(path, *overrides)  # stops during step 2
    assert validated_steps(tmp_path / "run") == [1] and len(answers) == 4
    assert train(path, *overrides)
    assert validated_steps(tmp_path / "run") == [1, 2, 3, 4] and not stops


@pytest.mark.slow
def test_resuming_with_other_settings(
    train, write_config, write_dataset, tmp_path, shallow_checkpoint
):
    path = write_config()
    assert train(path, *SHORT)
    message = r"config\.training\.adam_beta2 was 0\.999 and is 0\.9"
    with pytest.raises(CheckpointError, match=message):
        train(path, *SHORT, "training.adam_beta2=0.9")
    model = shutil.copytree(shallow_checkpoint, tmp_path / "other")
    config = json.loads((model / "config.json").read_text())
    config["llm_config"]["sliding_window"] = 8
    write_json(model / "config.json", config)
    with pytest.raises(CheckpointError, match=r"model\.llm_config\.sliding_window was 16 and is 8"):
        train(path, *SHORT, f"model={model}")
    assert len(read_metrics(tmp_path / "run")) == 2
    write_dataset("train.jsonl", 11)
    with pytest.raises(CheckpointError, match="rows was 13 and is 12"):
        train(path, *SHORT)


@pytest.mark.exhaustive
def test_settings_may_change_before_the_first_checkpoint(train, write_config, golden, tmp_path):
    data = (golden / "images/square.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])  # its header is complete
    dataset = tmp_path / "rows.jsonl"
    hi = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    rows = [{"image": "cut.png", "conversations": TURNS}, *[{"conversations": hi}] * 3]
    dataset.write_text("\n".join(map(json.dumps, rows)))
    path = write_config(dataset=dataset)
    with pytest.raises(DataError, match=r"cut\.png"):
        train(path, *SHORT)
    assert (tmp_path / "run/run.json").exists()
    assert train(path, *SHORT, "data.invalid_rows=skip")
    settings = json.loads((tmp_path / "run/run.json").read_text())
    assert settings["config"]["data"]["invalid_rows"] == "skip"


def test_result_without_its_checkpoint(train, write_config, tmp_path):
    path = write_config()
    (tmp_path / "run/model").mkdir(parents=True)
    message = "run/model exists, and the checkpoint of its last step does not"
    with pytest.raises(CheckpointError, match=message):
        train(path, *SHORT)


def test_second_run_in_the_same_folder(train, write_config, tmp_path):
    path = write_config()
    with lock_output(tmp_path / "run"):
        message = rf"run is in use by process {os.getpid()} on .*, started .*; wait for it or stop"
        with pytest.raises(TrainingError, match=message):
            train(path, *SHORT)
    assert not (tmp_path / "run/run.json").exists()


@pytest.mark.slow
def test_stop_while_the_result_is_written(train, write_config, tmp_path, monkeypatch):
    save_params = trainer.save_params

    def save_and_stop(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        save_params(*arguments, **options)

    monkeypatch.setattr(trainer, "save_params", save_and_stop)
    assert train(write_config(), *SHORT)
    assert [path.name for path in (tmp_path / "run").glob("model*")] == ["model"]


@pytest.mark.exhaustive
def test_resuming_on_a_mesh_with_other_padding(train, write_config, stop_at):
    path = write_config()
    stop_at(1)
    assert not train(path, "mesh.model=2", "mesh.rules=tensor")  # pads 69 visual words to 70
    with pytest.raises(CheckpointError, match=r"padded.visual_embedding was \[70, 64\]"):
        train(path)
    assert train(path, "mesh.model=2", "mesh.rules=tensor")


@pytest.mark.exhaustive
def test_resuming_adapters_on_a_mesh_with_other_padding(train, write_config, stop_at):
    path = write_config(trainable=False)
    lora = ("lora.rank=2", "lora.target_modules=visual_tokenizer/head")
    stop_at(1)
    assert not train(path, *lora, "mesh.model=2", "mesh.rules=tensor")
    message = r"padded\.visual_tokenizer/head/lora_b was \[70, 2\] and is None"
    with pytest.raises(CheckpointError, match=message):
        train(path, *lora)


@pytest.mark.exhaustive
def test_loss_that_is_not_finite(train, write_config, tmp_path, stop_at):
    path = write_config()
    stop_at(2)
    assert not train(path)
    message = "of step . is nan; .* smaller training.learning_rate"
    with pytest.raises(TrainingError, match=message):
        train(path, "training.learning_rate=1e30", "training.max_grad_norm=1e30")
    assert not (tmp_path / "run/model").exists()
    # The advice of the message works.
    assert train(path, "training.learning_rate=1e-3", "training.max_grad_norm=0.5")
    settings = json.loads((tmp_path / "run/run.json").read_text())
    assert settings["config"]["training"]["learning_rate"] == 1e-3


@pytest.mark.slow
def test_step_with_an_infinite_gradient_is_not_saved(train, write_config, tmp_path, monkeypatch):
    train_step = trainer.Trainer._train_step

    def diverging_step(self, micro_batches):
        metrics, num_tokens = train_step(self, micro_batches)
        if int(self._state.step) == 4:
            metrics = metrics._replace(grad_norm=np.float32(np.inf))
        return metrics, num_tokens

    monkeypatch.setattr(trainer.Trainer, "_train_step", diverging_step)
    with pytest.raises(TrainingError, match="the grad_norm of step 4 is inf; resume from"):
        train(write_config(), *SHORT)
    assert "Infinity" not in (tmp_path / "run/metrics.jsonl").read_text()
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["2"]
    assert train(write_config(), *SHORT)
