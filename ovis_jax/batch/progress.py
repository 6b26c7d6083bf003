"""Progress of a run: rows, tokens per second and the remaining time."""

import time
from datetime import timedelta

from rich.console import Console

from ovis_jax.console import SECONDS_BETWEEN_LINES, throughput_bar
from ovis_jax.errors import count_noun


class BatchProgress:
    """Context manager that displays the progress of a run.

    Args:
      console: Console on which the progress is displayed.
      num_answered: Number of rows that earlier runs have answered.
      num_rows: Total number of rows.

    Attributes:
      num_tokens: Number of tokens that this run has generated.
    """

    def __init__(self, console: Console, num_answered: int, num_rows: int):
        self._console = console
        self._progress = throughput_bar(console)
        self._task = self._progress.add_task("", total=num_rows, completed=num_answered, rate=0.0)
        self._before = self._num_answered = num_answered
        self._num_rows, self.num_tokens = num_rows, 0
        self._start = self._last_line = time.perf_counter()

    def __enter__(self) -> "BatchProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @property
    def rate(self) -> float:
        """Number of tokens per second since the start."""
        return self.num_tokens / (time.perf_counter() - self._start)

    def add_row(self, num_tokens: int) -> None:
        """Count an answered row and its tokens, and display them."""
        self._num_answered += 1
        self.num_tokens += num_tokens
        rate = self.rate
        self._progress.update(self._task, completed=self._num_answered, rate=rate)
        now = time.perf_counter()
        if not self._console.is_terminal and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            seconds_per_row = (now - self._start) / (self._num_answered - self._before)
            left = round(seconds_per_row * (self._num_rows - self._num_answered))
            self._console.print(
                f"{self._num_answered:,} of {count_noun(self._num_rows, 'row')}:"
                f" {rate:,.0f} tokens/s, {timedelta(seconds=left)} left",
                soft_wrap=True,
            )
