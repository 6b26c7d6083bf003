"""What tests of the serving side share: sizes, pictures in requests, a server in a thread."""

import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import jaxtyping
import pytest
import uvicorn
from PIL import Image

from benchmarks import serving
from benchmarks.storm import data_url, noise
from ovis_jax.loading import LoadedOvis
from ovis_jax.serving.answer import Event, Job, Piece
from ovis_jax.serving.engine import Engine
from ovis_jax.serving.listening import DrainingServer
from ovis_jax.serving.prepare import Limits
from ovis_jax.serving.steps import Steps

SLOTS, MAX_LENGTH, PIECE, QUEUE = 4, 320, 24, 40
LIMITS = Limits(max_body=2**20, max_images=3, max_pixels=250_000, max_tokens=250, seconds=120)

ASK: dict[str, Any] = {"model": "ovis-tiny", "temperature": 0}
ENDLESS: dict[str, Any] = {
    "max_tokens": LIMITS.max_tokens,
    "extra_body": {"repetition_penalty": 0.01},
}
"""A penalty below 1 makes a model repeat itself to the end."""


@contextmanager
def listening(app, engine: Engine | None = None, drain: float = 0.0):
    """Serve an application from a thread; gives the server and its URL.

    With an engine it stops as `ovis-jax serve` does, else as any server that knows nothing of it.
    """
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=60)
    server = DrainingServer(config, engine, drain) if engine else uvicorn.Server(config)
    with serving.listening(server) as url:
        yield server, url


def compile_steps(ovis: LoadedOvis) -> Steps:
    with pytest.MonkeyPatch.context() as patch:
        # Lowering makes a Sampling of descriptions of arrays, which is none to the tests' checks.
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        sizes = dict(num_slots=SLOTS, max_length=MAX_LENGTH, piece=PIECE)
        return Steps(ovis.model, ovis.params, **sizes)


def slow_down(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every token take longer."""
    write = Steps.write

    def late(*arguments):
        time.sleep(seconds)
        return write(*arguments)

    monkeypatch.setattr(Steps, "write", late)


def idle(engine: Engine) -> bool:
    """Whether nothing is going on, a moment after the last answer."""
    until(lambda: not engine.running and not engine.waiting)
    return True


def until(holds: Callable[[], Any]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


@dataclass
class Answered:
    """A job, and the events that it got."""

    job: Job
    events: list[Event]
    over: threading.Event

    def wait(self) -> "Answered":
        assert self.over.wait(120)
        return self

    def text(self, choice: int = 0) -> str:
        pieces = [e for e in self.wait().events if isinstance(e, Piece) and e.choice == choice]
        assert [p.reason is not None for p in pieces] == [False] * (len(pieces) - 1) + [True]
        return "".join(piece.text for piece in pieces)


def picture(seed: int, size: tuple[int, int] = (84, 84)) -> Image.Image:
    return noise(seed, size)


def shown(image: Image.Image, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image), **more}}


def say(text: str, *images: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def counted(url: str) -> dict[str, float]:
    """What /metrics says, by name."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {k: float(v) for k, v in (x.rsplit(" ", 1) for x in lines if x[:1] != "#")}
