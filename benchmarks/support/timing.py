"""Timing of calls that take turns.

Times differ between machines and vary with other load. Calls that are compared therefore take turns
in the same run, and each result is a median with its range.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Timings:
    """Seconds of one call, per repeat."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median in seconds."""
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """Return the median, the fastest and the slowest repeat, and the number of repeats."""
        return {
            "median": self.median,
            "fastest": min(self.seconds),
            "slowest": max(self.seconds),
            "repeats": len(self.seconds),
        }


def format_timing(timing: Mapping[str, Any], scale: float = 1e3) -> str:
    """Format the result of `Timings.to_json` as median and range, multiplied by `scale`."""
    low, middle, high = (timing[key] * scale for key in ("fastest", "median", "slowest"))
    return f"{middle:.4g} ({low:.4g} - {high:.4g})"


def time_in_turns(
    calls: Mapping[str, Callable[[], Any]], repeats: int, warmup_rounds: int = 1
) -> dict[str, Timings]:
    """Time several calls in turn.

    A call ends when the JAX arrays that it returned are ready. Every other round runs in reverse
    order, so that no call always follows the same one.

    Args:
      calls: functions to time, by name.
      repeats: number of timed rounds.
      warmup_rounds: number of rounds that run before the timed ones.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmup_rounds + repeats):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            elapsed = time.perf_counter() - start
            if number >= warmup_rounds:
                seconds[name].append(elapsed)
    return {name: Timings(tuple(values)) for name, values in seconds.items()}
