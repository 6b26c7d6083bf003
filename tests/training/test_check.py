"""`ovis-jax train --check`: what it prints, and every problem that it finds."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from ovis_jax.training.check import check_recipe
from ovis_jax.training.config import read_train_config

TURNS = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "I."}]


@pytest.fixture
def check():
    """Check a recipe, and return whether it is valid and what is printed."""

    def check(path, *overrides: str) -> tuple[bool, str]:
        output = io.StringIO()
        config = read_train_config(path, overrides)
        return check_recipe(config, Console(file=output, width=400)), output.getvalue()

    return check


def test_valid_recipe(check, write_config, write_dataset, tmp_path):
    more = write_dataset("more.jsonl", 9)
    path = write_config(f'data.validation_files = ["{write_dataset("held.jsonl", 4)}"]')
    files = f'data.train_files=["{tmp_path / "train.jsonl"}", "{more}"]'
    is_valid, text = check(path, files, "data.train_weights=[1, 0.5]")
    assert is_valid and "0 problems found" in text
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    assert [str(more), "10", "0.5", "5"] in cells
    assert ["128", "1", "18", "9"] in [row[:4] for row in cells]
    assert "the run: 12 steps" in text and "5 validation rows" in text
    assert "an epoch: 9 steps, 9 micro-batches of 2 rows, 1 shape" in text
    assert not (tmp_path / "run").exists()


def test_all_problems_are_listed(check, write_config, write_dataset, golden, tmp_path):
    data = (golden / "images/square.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    no_answer = {"conversations": [{"from": "human", "value": "Who?"}]}
    too_long = {"conversations": [{"from": "human", "value": "Who? " * 9000}, TURNS[1]]}
    pair = {"prompt": "Who?", "chosen": "I.", "rejected": "You."}
    images = [{"image": name, "conversations": TURNS} for name in ("gone.png", "cut.png")]
    more = write_dataset("more.jsonl", 1, no_answer, too_long, pair, *images, text_row=False)
    held = write_dataset("held.jsonl", 1, no_answer, images[1], too_long, text_row=False)
    path = write_config(f'data.validation_files = ["{held}"]')
    files = f'data.train_files=["{tmp_path / "train.jsonl"}", "none.jsonl", "{more}"]'
    for mode in ("error", "skip"):
        is_valid, text = check(path, files, f"data.invalid_rows={mode}")
        problems = [line for line in text.splitlines() if line.startswith("wrong: ")]
        assert not is_valid and "9 problems found" in text
        expected = [
            ("none.jsonl cannot be read", ""),
            ("more.jsonl: row 2: ", "no turn from gpt"),
            ("more.jsonl: row 4: ", "training.objective=sft needs rows with conversations"),
            ("more.jsonl: row 3: ", "positions long"),
            ("more.jsonl: row 5: ", "gone.png"),
            ("more.jsonl: row 6: ", "cut.png"),
            ("held.jsonl: row 2: ", "no turn from gpt"),
            ("held.jsonl: row 3: ", "cut.png"),
            ("held.jsonl: row 4 ", "positions long"),
        ]
        for where, what in expected:
            (found,) = (line for line in problems if where in line and what in line)
            problems.remove(found)
        assert not problems


def test_no_valid_row(check, write_config, tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"conversations": []}))
    is_valid, text = check(write_config(dataset=tmp_path / "bad.jsonl"))
    assert not is_valid and "1 problem found" in text


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 1])
def test_command_uses_no_device(write_config, write_dataset, code):
    no_answer = {"conversations": [TURNS[0]]}
    dataset = write_dataset("rows.jsonl", 3, *[no_answer] * code)
    ended = subprocess.run(
        [sys.executable, "-m", "ovis_jax", "train", "--check", str(write_config(dataset=dataset))],
        env=os.environ | {"JAX_PLATFORMS": "none"},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (code, "")
    assert f"{code} problem" in ended.stdout
