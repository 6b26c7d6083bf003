"""The bar of a run: steps, loss, tokens a second, and when it will end."""

import time

from jax import Array
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SMOOTHING = 0.05
"""The rate that is shown is of about 1 / SMOOTHING steps."""
PLAIN_LINE_SECONDS = 60
"""Where there is no terminal, a line is printed this often."""


class Bar:
    """Shows steps from `done` to `total`; used as a context.

    The loss that it shows is that of the step before, so that nothing waits for the one at hand.
    """

    def __init__(self, console: Console, done: int, total: int):
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[rate]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._console, self._total = console, total
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=total, completed=done, loss=0.0, rate=0.0)
        self._tokens = self._seconds = 0.0
        self._loss: Array | None = None
        self._last = self._said = time.perf_counter()

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, done: int, tokens: int, loss: Array) -> float:
        """Note a step that was begun and the tokens that it reads; gives tokens a second."""
        before, self._loss = self._loss, loss
        shown = float(loss if before is None else before)  # waits for that step
        now = time.perf_counter()
        keep = 1 - SMOOTHING
        self._tokens = keep * self._tokens + tokens
        self._seconds = keep * self._seconds + now - self._last
        rate, self._last = self._tokens / self._seconds, now
        self._progress.update(self._task, completed=done, loss=shown, rate=rate)
        if not self._console.is_terminal and now - self._said > PLAIN_LINE_SECONDS:
            self._said = now
            self.say(f"step {done} of {self._total}: loss {shown:.4f}, {rate:,.0f} tokens/s")
        return rate

    def say(self, message: str) -> None:
        """A line above the bar."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)
