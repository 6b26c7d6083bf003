"""What may be wrong with a run or its rows: how it is told, and how the run goes on then."""

import io
import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
from rich.console import Console

from ovis_jax.checkpoint.writer import write_json
from ovis_jax.errors import CheckpointError, DataError, TrainingError
from ovis_jax.training import loop
from ovis_jax.training.config import read_config
from ovis_jax.training.metrics import read_metrics

TURNS = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "I."}]
SHORT = ("run.steps=4", "run.save_every=2")


def run(path, *overrides: str) -> bool:
    return loop.train(read_config(path, overrides), Console(quiet=True))


def said_by(path, *overrides: str) -> str:
    """What a run that comes to its end prints."""
    console = Console(record=True, width=400, file=io.StringIO())
    assert loop.train(read_config(path, overrides), console)
    return console.export_text()


def scored_steps(folder) -> list[int]:
    return [line["step"] for line in read_metrics(folder) if "accuracy" in line]


def test_bad_rows_are_fatal_or_left_out_by_name(write_config, write_rows):
    no_answer = {"conversations": [{"from": "human", "value": "Who?"}]}
    rows = write_rows("bad.jsonl", 6, no_answer, {"image": "gone.png", "conversations": TURNS})
    with pytest.raises(DataError, match=r"bad\.jsonl: row 8: no turn from gpt.* mend it, or"):
        run(write_config(rows=rows))
    said = said_by(write_config(rows=rows), "data.unreadable=skip")
    assert "row 8: no turn from gpt" in said and re.search(r"row 9: .*gone\.png", said)
    assert "rows left out: 2" in said


def test_rows_that_cannot_be_scored(write_config, write_rows, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    too_long = [{"from": "human", "value": "Who? " * 20_000}, TURNS[1]]
    asks = {"conversations": [TURNS[1], {"from": "human", "value": "Who?"}]}
    gone = {"image": "gone.png", "conversations": TURNS}
    more = [asks, gone, {"image": "broken.png", "conversations": TURNS}]
    held_out = write_rows("held.jsonl", 2, *more, {"conversations": too_long})
    path = write_config(f'data.validation = ["{held_out}"]')
    with pytest.raises(DataError, match=r"row 4: the last turn is not from gpt.*and 1 more such"):
        run(path, *SHORT)
    assert not (tmp_path / "run").exists()
    said = said_by(path, *SHORT, "data.unreadable=skip", "run.evaluate_every=2")
    assert "row 4: the last turn is not from gpt" in said and "row 5: there is no file" in said
    assert re.search(r"row 6: .*broken\.png", said) and "positions long" in said
    assert said.count("left out: ") == 5 and "rows left out: 4" in said
    assert said.count("of held-out answers exact, mean of the kinds") == 2
    assert (tmp_path / "run/model").exists()


def test_no_row_that_can_be_scored(write_config, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    held_out = tmp_path / "held.jsonl"
    held_out.write_text(json.dumps({"image": "broken.png", "conversations": TURNS}))
    path = write_config(f'data.validation = ["{held_out}"]')
    said = said_by(path, *SHORT, "data.unreadable=skip")
    assert "rows left out: 1" in said and not scored_steps(tmp_path / "run")


def test_asked_to_stop_it_does_not_score_until_it_goes_on(
    write_config, write_rows, tmp_path, monkeypatch, ask_to_stop
):
    path = write_config(f'data.validation = ["{write_rows("held.jsonl", 2)}"]')
    overrides = (*SHORT, "run.save_every=4", "run.evaluate_every=1")
    answer_rows, asked, stops = loop.answer_rows, [], [True, False, False, False, False]

    def answers(*arguments, **options):
        for number, answer in enumerate(answer_rows(*arguments, **options)):
            if number == 0 and stops.pop(0):
                os.kill(os.getpid(), signal.SIGTERM)
            asked.append(answer)
            yield answer

    monkeypatch.setattr(loop, "answer_rows", answers)
    ask_to_stop(2)
    assert not run(path, *overrides)  # while the answers to step 1 are made
    assert len(asked) == 1 and not scored_steps(tmp_path / "run")
    assert not run(path, *overrides)  # while step 2 is made
    assert scored_steps(tmp_path / "run") == [1] and len(asked) == 4
    assert run(path, *overrides)
    assert scored_steps(tmp_path / "run") == [1, 2, 3, 4] and not stops


def test_another_run_in_the_same_folder(write_config, write_rows, tmp_path, shallow_checkpoint):
    path = write_config()
    assert run(path, *SHORT)
    with pytest.raises(CheckpointError, match=r"config\.optimizer\.b2 was 0\.999 and is 0\.9"):
        run(path, *SHORT, "optimizer.b2=0.9")
    model = shutil.copytree(shallow_checkpoint, tmp_path / "other")
    config = json.loads((model / "config.json").read_text())
    config["llm_config"]["sliding_window"] = 8
    write_json(model / "config.json", config)
    with pytest.raises(CheckpointError, match=r"model\.llm_config\.sliding_window was 16 and is 8"):
        run(path, *SHORT, f"model={model}")
    assert len(read_metrics(tmp_path / "run")) == 2
    write_rows("train.jsonl", 11)
    with pytest.raises(CheckpointError, match="rows was 13 and is 12"):
        run(path, *SHORT)


def test_a_run_without_a_checkpoint_may_be_told_something_else(write_config, tmp_path):
    rows = tmp_path / "rows.jsonl"
    hi = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    lines = [{"image": "gone.png", "conversations": TURNS}, *[{"conversations": hi}] * 3]
    rows.write_text("\n".join(map(json.dumps, lines)))
    path = write_config(rows=rows)
    with pytest.raises(DataError, match=r"gone\.png"):
        run(path, *SHORT)
    assert (tmp_path / "run/run.json").exists()
    assert run(path, *SHORT, "data.unreadable=skip")
    assert (
        json.loads((tmp_path / "run/run.json").read_text())["config"]["data"]["unreadable"]
        == "skip"
    )


def test_a_result_without_its_checkpoint_is_not_taken_for_this_run(write_config, tmp_path):
    path = write_config()
    (tmp_path / "run/model").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="run/model is there, and the checkpoint .* move it"):
        run(path, *SHORT)


def test_asked_to_stop_while_the_result_is_written(write_config, tmp_path, monkeypatch):
    save_params = loop.save_params

    def save(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        save_params(*arguments, **options)

    monkeypatch.setattr(loop, "save_params", save)
    assert run(write_config(), *SHORT)
    assert [path.name for path in (tmp_path / "run").glob("model*")] == ["model"]


def test_a_mesh_that_pads_otherwise_cannot_resume(write_config, ask_to_stop):
    path = write_config()
    ask_to_stop(1)
    assert not run(path, "mesh.model=2", "mesh.rules=tensor")  # 69 visual words and 1 of padding
    complaint = r"padded.visual_embedding was \[70, 64\] and is None; set them back"
    with pytest.raises(CheckpointError, match=complaint):
        run(path)
    assert run(path, "mesh.model=2", "mesh.rules=tensor")


def test_adapters_that_a_mesh_pads_otherwise_cannot_resume(write_config, ask_to_stop):
    path = write_config()
    path.write_text(path.read_text().replace("learn.parts", "#"))
    lora = ("learn.lora.rank=2", "learn.lora.targets=visual_tokenizer/head")
    ask_to_stop(1)
    assert not run(path, *lora, "mesh.model=2", "mesh.rules=tensor")
    complaint = r"padded\.visual_tokenizer/head/b was \[70, 2\] and is None; set them back"
    with pytest.raises(CheckpointError, match=complaint):
        run(path, *lora)


def test_a_loss_that_is_no_number_ends_the_run(write_config, tmp_path, ask_to_stop):
    path = write_config()
    ask_to_stop(2)
    assert not run(path)
    with pytest.raises(TrainingError, match="of step . is nan; .* smaller optimizer.learning_rate"):
        run(path, "optimizer.learning_rate=1e30", "optimizer.clip_norm=1e30")
    assert not (tmp_path / "run/model").exists()
    # What it says to do can be done.
    assert run(path, "optimizer.learning_rate=1e-3", "optimizer.clip_norm=0.5")
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["config"]["optimizer"]["learning_rate"] == 1e-3


def test_a_gradient_that_is_no_number_is_not_saved(write_config, tmp_path, monkeypatch):
    step = loop.step

    def broken(*arguments):
        state, measured = step(*arguments)
        if int(state.step) == 4:
            measured = measured._replace(gradient_norm=np.float32(np.inf))
        return state, measured

    monkeypatch.setattr(loop, "step", broken)
    with pytest.raises(TrainingError, match="the gradient_norm of step 4 is inf; go on from"):
        run(write_config(), *SHORT)
    assert "Infinity" not in (tmp_path / "run/metrics.jsonl").read_text()
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["2"]
    assert run(write_config(), *SHORT)
