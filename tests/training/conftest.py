"""A small data set about the golden images, and short runs on it."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ovis_jax.training import loop

NAMES = ("square", "tiny", "exact", "wide", "tall")


@pytest.fixture
def write_rows(golden, tmp_path):
    """Write a data set of `count` conversations, some without an image; gives its path."""

    def write(name: str, count: int, *more: dict) -> Path:
        rows = []
        for number in range(count):
            image = NAMES[number % len(NAMES)]
            asked = {"from": "human", "value": f"<image>\nQuestion {number}?"}
            told = {"from": "gpt", "value": f"It is {image}."}
            path = str(golden / f"images/{image}.png")
            rows.append({"image": path, "kind": image, "conversations": [asked, told]})
        hi = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
        rows.append({"conversations": hi})
        rows += more
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
        return tmp_path / name

    return write


@pytest.fixture
def write_config(tmp_path, write_rows, shallow_checkpoint):
    """Write a config of a short run on the shallow checkpoint; gives its path."""

    def write(*lines: str, rows=None):
        data = rows or write_rows("train.jsonl", 12)
        text = f"""
            model = "{shallow_checkpoint}"
            output = "{tmp_path / "run"}"
            learn.parts = ["llm", "visual_embedding"]
            data.train = ["{data}"]
            data.rows = 2
            data.length_unit = 128
            data.max_partition = 1
            optimizer.learning_rate = 3e-3
            run.steps = 12
            run.log_every = 2
            run.save_every = 4
        """
        path = tmp_path / "config.toml"
        path.write_text("\n".join([*map(str.strip, text.splitlines()), *lines]))
        return path

    return write


@pytest.fixture
def ask_to_stop(monkeypatch) -> Callable[..., list[int]]:
    """Send SIGTERM while these steps are made; gives a list that grows with every step."""

    def ask(*at: int) -> list[int]:
        made: list[int] = []
        real_step = loop.step

        def step_and_stop(*arguments):
            made.append(len(made) + 1)
            if made[-1] in at:
                os.kill(os.getpid(), signal.SIGTERM)
            return real_step(*arguments)

        monkeypatch.setattr(loop, "step", step_and_stop)
        return made

    return ask
