"""One warm engine and one server on the bundled checkpoint for all tests of the serving side."""

import threading
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
from served import LIMITS, QUEUE, Answered, compile_steps, listening, slow_down

from ovis_jax import Sampling, load
from ovis_jax.serving.answer import Event, Failed, Job, Piece
from ovis_jax.serving.app import make_app
from ovis_jax.serving.engine import Engine
from ovis_jax.training.rows import read_rows
from recipes.ovis_tiny import draw_data


@pytest.fixture(scope="session")
def ovis():
    return load("ovis-tiny")


@pytest.fixture(scope="session")
def steps(ovis):
    return compile_steps(ovis)


@pytest.fixture
def slowly(monkeypatch):
    """Let every token take 10 ms, so that no answer ends before a test has done what it does."""
    slow_down(monkeypatch, 0.01)


@pytest.fixture(scope="session")
def engine(ovis, steps):
    return Engine(ovis, steps, queue=QUEUE)


@pytest.fixture(scope="session")
def app(engine, ovis):
    return make_app(engine, ovis.processor, "ovis-tiny", limits=LIMITS)


@pytest.fixture(scope="session")
def url(app):
    with listening(app) as (_, url):
        yield url


@pytest.fixture(scope="session")
def client(url):
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def ask(ovis):
    """Make a job of a question, and send it to an engine."""

    def ask(engine: Engine, prompt: Any, images: Any = (), **options: Any) -> Answered:
        inputs = ovis.processor([prompt], [list(images)], control=False)
        answered = Answered(None, [], threading.Event())  # pyright: ignore

        def emit(event: Event) -> None:
            answered.events.append(event)
            ends = [e for e in answered.events if isinstance(e, Piece) and e.reason]
            if isinstance(event, Failed) or len(ends) == answered.job.choices:
                answered.over.set()

        tokens = inputs.tokens[0][inputs.positions[0] >= 0]
        crops = int(np.sum(tokens == -300)) // 9
        given = {"sampling": Sampling(), "seed": 0, "max_new_tokens": 32}
        given |= {"deadline": time.monotonic() + 120}
        answered.job = Job(tokens, inputs.pixels[:crops], emit=emit, **(given | options))
        engine.submit(answered.job)
        return answered

    return ask


@pytest.fixture(scope="session")
def scene_file(tmp_path_factory):
    """A data set of questions about pictures."""
    folder = tmp_path_factory.mktemp("served")
    make = partial(draw_data.scored_lines, split="test", seed=2, colour="")
    draw_data.write(folder, make, len(draw_data.KINDS) * len(draw_data.LANGUAGES), workers=1)
    return folder / "test.jsonl"


@pytest.fixture(scope="session")
def scenes(scene_file):
    """Its questions with their answers: (turns, images, answer)."""
    rows = read_rows([scene_file]).rows
    return [(row.turns[:-1], row.open_images(), row.turns[-1]["content"]) for row in rows]
