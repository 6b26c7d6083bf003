"""A JAX profiler trace of some steps in a training run."""

from pathlib import Path

import jax
from jax import Array
from rich.console import Console

from ovis_jax.errors import TrainingError

PROFILE_FOLDER = "profile"
NUM_WARMUP_STEPS = 2
"""Number of steps before the trace, so that it contains no compilation and no first execution."""


class StepProfiler:
    """Context manager that writes a trace to the folder profile/ of a run.

    Args:
      folder: Output folder of the run.
      step: Step at which the run starts or resumes.
      max_steps: Last step of the run.
      num_steps: Number of steps in the trace, which follow the first two steps.

    Raises:
      TrainingError: The run has too few remaining steps.
    """

    def __init__(self, folder: Path, step: int, max_steps: int, num_steps: int):
        if (most := max(max_steps - step - NUM_WARMUP_STEPS, 0)) < num_steps:
            raise TrainingError(
                f"--profile {num_steps}: expected at most {most}, because {max_steps - step} of"
                f" {max_steps} steps remain and the first {NUM_WARMUP_STEPS} are not in the trace;"
                " choose fewer steps, or increase training.max_steps"
            )
        self._folder = folder / PROFILE_FOLDER
        self._first = step + NUM_WARMUP_STEPS + 1
        self._last = self._first + num_steps - 1
        self._is_tracing = False

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_tracing:
            jax.profiler.stop_trace()

    def is_due(self, step: int) -> bool:
        """Return whether the trace starts or ends after this step."""
        return step in (self._first - 1, self._last)

    def after_step(self, step: int, loss: Array, console: Console) -> None:
        """Wait for the step that computes `loss`, and start or end the trace if it is due."""
        if not self.is_due(step):
            return
        jax.block_until_ready(loss)
        if step < self._first:
            jax.profiler.start_trace(self._folder)
            self._is_tracing = True
            return
        self._is_tracing = False
        jax.profiler.stop_trace()
        console.print(
            f"profile of steps {self._first} to {self._last}: {self._folder}; to open it, run"
            f" `pip install xprof`, then `xprof --port 8791 {self._folder}`",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
