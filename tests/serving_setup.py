"""Helpers for tests of the engine and the server: sizes, request bodies, a server in a thread."""

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from PIL import Image

from benchmarks import server_throughput
from benchmarks.support.server_load import noise_image, png_data_url
from ovis_jax.engine.request import Delta, Failure, Request
from ovis_jax.engine.scheduler import Scheduler
from ovis_jax.server.preprocess import RequestLimits
from ovis_jax.server.shutdown import DrainingServer

MAX_NUM_SEQS, MAX_MODEL_LEN, CHUNK_SIZE = 4, 320, 24
SIZES = {
    "max_num_seqs": MAX_NUM_SEQS,
    "max_model_len": MAX_MODEL_LEN,
    "chunk_size": CHUNK_SIZE,
    "max_queued_requests": 40,
}
LIMITS = RequestLimits(
    max_body_bytes=2**20, max_images=3, max_pixels=250_000, max_tokens=250, request_timeout=120
)

FIELDS: dict[str, Any] = {"model": "ovis-tiny", "temperature": 0}
ENDLESS_FIELDS: dict[str, Any] = {
    "max_tokens": LIMITS.max_tokens,
    "extra_body": {"repetition_penalty": 0.01},
}
"""A penalty below 1 makes a model repeat itself up to the maximum length."""


@contextmanager
def running_server(app, schedulers: Sequence[Scheduler] = (), shutdown_timeout: float = 0.0):
    """Serve an application from a thread; yields the server and its URL.

    With schedulers it stops like `ovis-jax serve`, otherwise like any other uvicorn server.
    """
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=60)
    server = uvicorn.Server(config)
    if schedulers:
        server = DrainingServer(config, schedulers, shutdown_timeout)
    with server_throughput.run_server(server) as url:
        yield server, url


class DecodeGate:
    """Blocks the engine before each decode step until the test lets it run."""

    def __init__(self):
        self._changed = threading.Condition()
        self._permits, self._num_blocked = 0, 0

    def enter(self) -> None:
        """Called by the engine before a step."""
        with self._changed:
            self._num_blocked += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._permits > 0, 60)
            self._permits -= 1
            self._num_blocked -= 1

    def run(self, steps: int, num_engines: int = 1) -> None:
        """Let an engine run some steps, and wait until all engines are blocked before the next."""

        def all_blocked() -> bool:
            return self._permits == 0 and self._num_blocked == num_engines

        with self._changed:
            self._permits += steps
            self._changed.notify_all()
            assert self._changed.wait_for(all_blocked, 60)

    def open(self) -> None:
        """Let the engine run freely from now on."""
        with self._changed:
            self._permits = math.inf
            self._changed.notify_all()


def is_idle(scheduler: Scheduler) -> bool:
    """Wait until no request is waiting or running; clients get their answers slightly earlier."""
    wait_until(scheduler, lambda: not scheduler.num_running and not scheduler.num_waiting)
    return True


def wait_until(scheduler: Scheduler, condition: Callable[[], Any]) -> None:
    """Wait until another thread has changed the scheduler or one of its requests."""
    with scheduler.changed:
        assert scheduler.changed.wait_for(condition, 60)


@dataclass
class Submitted:
    """A submitted request and its events."""

    request: Request = field(init=False)
    events: list[Delta | Failure] = field(default_factory=list)
    complete: threading.Event = field(default_factory=threading.Event)

    def on_event(self, event: Delta | Failure) -> None:
        self.events.append(event)
        finished = [e for e in self.events if isinstance(e, Delta) and e.finish_reason]
        if isinstance(event, Failure) or len(finished) == self.request.num_choices:
            self.complete.set()

    def wait(self) -> "Submitted":
        assert self.complete.wait(120)
        return self

    def last_event(self) -> Delta | Failure:
        return self.wait().events[-1]

    def text(self, choice: int = 0) -> str:
        deltas = [e for e in self.wait().events if isinstance(e, Delta) and e.choice == choice]
        ended = [delta.finish_reason is not None for delta in deltas]
        assert ended == [False] * (len(deltas) - 1) + [True]
        return "".join(delta.text for delta in deltas)


def make_image(seed: int, size: tuple[int, int] = (84, 84)) -> Image.Image:
    return noise_image(seed, size)


def image_part(image: Image.Image, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": png_data_url(image), **fields}}


def user_message(text: str, *parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def read_metrics(url: str) -> dict[str, float]:
    """Values of /metrics by name."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {k: float(v) for k, v in (x.rsplit(" ", 1) for x in lines if x[:1] != "#")}
