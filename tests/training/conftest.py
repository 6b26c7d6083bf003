"""A small dataset about the golden images, and configs of short runs."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from ovis_jax.training import trainer
from ovis_jax.training.config import read_train_config

IMAGES = ("square", "tiny", "exact", "wide", "tall")


@pytest.fixture
def write_dataset(golden, tmp_path):
    """Write `count` conversations about images and one without, and return the path.

    The images have one crop each, so the text row has the only batch of another shape.
    """

    def write(name: str, count: int, *more: dict, text_row: bool = True) -> Path:
        rows = []
        for number in range(count):
            image = IMAGES[number % len(IMAGES)]
            question = {"from": "human", "value": f"<image>\nQuestion {number}?"}
            answer = {"from": "gpt", "value": f"It is {image}."}
            path = str(golden / f"images/{image}.png")
            rows.append({"image": path, "kind": image, "conversations": [question, answer]})
        hi = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
        rows += [{"conversations": hi}] * text_row
        rows += more
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
        return tmp_path / name

    return write


@pytest.fixture
def write_config(tmp_path, write_dataset, shallow_checkpoint):
    """Write the config of a short run on the shallow checkpoint, and return its path."""

    def write(*lines: str, dataset: Path | None = None, trainable: bool = True) -> Path:
        dataset = dataset or write_dataset("train.jsonl", 13, text_row=False)
        text = f"""
            model = "{shallow_checkpoint}"
            output_dir = "{tmp_path / "run"}"
            {'trainable = ["llm", "visual_embedding"]' if trainable else ""}
            data.train_files = ["{dataset}"]
            data.micro_batch_size = 2
            data.pad_to_multiple_of = 128
            data.max_partition = 1
            training.max_steps = 12
            training.learning_rate = 3e-3
            run.logging_steps = 2
            run.save_steps = 4
        """
        path = tmp_path / "config.toml"
        path.write_text("\n".join([*map(str.strip, text.splitlines()), *lines]))
        return path

    return write


@pytest.fixture(scope="session")
def train():
    """Start or resume the run of a config."""

    def train(path: Path, *overrides: str, console: Console | None = None) -> bool:
        config = read_train_config(path, overrides)
        return trainer.Trainer(config, console or Console(quiet=True)).train()

    return train


@pytest.fixture
def stop_at(monkeypatch) -> Callable[..., list[int]]:
    """Send SIGTERM during these steps; returns a list that grows with every step."""

    def stop(*steps: int) -> list[int]:
        finished: list[int] = []
        train_step = trainer.Trainer._train_step

        def step_and_stop(*arguments):
            finished.append(len(finished) + 1)
            if finished[-1] in steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(*arguments)

        monkeypatch.setattr(trainer.Trainer, "_train_step", step_and_stop)
        return finished

    return stop
