"""One warm engine and one server of the bundled checkpoint for all tests of both."""

import time
from functools import partial
from typing import Any

import pytest
from serving_setup import LIMITS, SIZES, DecodeGate, Submitted, running_server

from ovis_jax import Sampling, load
from ovis_jax.engine.constraints import Constraint, ConstraintCompiler
from ovis_jax.engine.request import Request
from ovis_jax.engine.runner import ModelRunner
from ovis_jax.engine.scheduler import Scheduler, run_engine
from ovis_jax.inputs.dataset import read_dataset
from ovis_jax.server.app import create_app
from recipes.ovis_tiny import generate_dataset


@pytest.fixture(scope="session")
def ovis():
    return load("ovis-tiny")


@pytest.fixture(scope="session")
def scheduler(ovis):
    with run_engine(ovis, **SIZES) as scheduler:
        yield scheduler


@pytest.fixture(scope="session")
def runner(scheduler):
    return scheduler._runner


@pytest.fixture
def make_scheduler(ovis, runner):
    """Make schedulers that a test may close; the rest are closed after it."""
    made = []

    def make(max_queued_requests: int = 9, **options: Any) -> Scheduler:
        made.append(Scheduler(ovis, runner, max_queued_requests=max_queued_requests, **options))
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close(30.0)


@pytest.fixture
def decode_gate(monkeypatch):
    """Block every engine before each decode step until the test lets it run."""
    gate, run_decode = DecodeGate(), ModelRunner.run_decode

    def gated(*arguments):
        gate.enter()
        return run_decode(*arguments)

    monkeypatch.setattr(ModelRunner, "run_decode", gated)
    yield gate
    gate.open()


@pytest.fixture(scope="session")
def app(scheduler):
    return create_app([scheduler], "ovis-tiny", limits=LIMITS)


@pytest.fixture(scope="session")
def url(app):
    with running_server(app) as (_, url):
        yield url


@pytest.fixture(scope="session")
def client(url):
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def compile_constraint(ovis):
    """Compile a constraint to one matcher per choice."""
    config = ovis.config
    compiler = ConstraintCompiler(
        ovis.processor.tokenizer, config.decoder.vocab_size, config.eos_ids
    )

    def compile_constraint(kind: Any, value: str, num_choices: int = 1):
        return compiler.compile(Constraint("the field", kind, value), num_choices).result(60)

    return compile_constraint


@pytest.fixture(scope="session")
def submit(ovis):
    """Submit a question to an engine."""

    def submit(scheduler: Scheduler, prompt: Any, images: Any = (), **options: Any) -> Submitted:
        submitted = Submitted()
        defaults = {"sampling": Sampling(), "seed": 0, "max_new_tokens": 32}
        defaults |= {"deadline": time.monotonic() + 120}
        example = ovis.processor.encode(prompt, images, parse_special_tokens=False)
        submitted.request = Request(
            example.tokens,
            example.pixels,
            on_event=submitted.on_event,
            **(defaults | options),
        )
        scheduler.submit(submitted.request)
        return submitted

    return submit


@pytest.fixture(scope="session")
def scene_file(tmp_path_factory):
    """A dataset of questions about pictures."""
    folder = tmp_path_factory.mktemp("served")
    make = partial(generate_dataset.evaluation_lines, split="test", seed=2, colour="")
    number = len(generate_dataset.KINDS) * len(generate_dataset.LANGUAGES)
    generate_dataset.write_dataset(folder, make, number, num_workers=1)
    return folder / "test.jsonl"


@pytest.fixture(scope="session")
def scenes(scene_file):
    """The questions of that file with their answers: (turns, images, answer)."""
    rows = read_dataset([scene_file]).rows
    return [(row.turns[:-1], row.open_images(), row.turns[-1]["content"]) for row in rows]
