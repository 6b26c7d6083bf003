"""Progress reports for a training run: metrics files, TensorBoard, a plot and a progress bar."""

import json
import time
from pathlib import Path
from typing import Any

from jax import Array
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import TextColumn
from tensorboardX import SummaryWriter

from ovis_jax.console import SECONDS_BETWEEN_LINES, throughput_bar

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"
SMOOTHING = 0.05
"""The displayed rate is an exponential moving average over about 1 / SMOOTHING steps."""


class MetricsWriter:
    """Writes the metrics of a run to its folder.

    Args:
      folder: Output folder of the run.
      step: Step at which the run starts or resumes. Metrics from later steps are removed.
    """

    def __init__(self, folder: Path, step: int):
        self._folder = folder
        self._path = folder / METRICS_FILE
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Write the metrics of a step, which are numbers or dicts of numbers by name."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            numbers = value if isinstance(value, dict) else {"": value}
            for key, number in numbers.items():
                self._tensorboard.add_scalar(f"{name}/{key}".strip("/"), number, step)

    def close(self) -> None:
        """Close the files and draw the plot."""
        self._tensorboard.close()
        plot_metrics(self._folder)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run, without an incomplete last line."""
    path = folder / METRICS_FILE
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot_metrics(folder: Path) -> None:
    """Plot a run's loss and validation accuracy by step, and save the plot in its folder."""
    lines = read_metrics(folder)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    axes.plot(*zip(*losses, strict=True) if losses else ([], []), color="tab:blue", linewidth=1)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    accuracies = [(line["step"], line["accuracy"]) for line in lines if "accuracy" in line]
    if accuracies:
        right = axes.twinx()
        right.plot(*zip(*accuracies, strict=True), color="tab:orange", marker="o", markersize=3)
        right.set(ylabel="exact match on validation rows, mean over kinds", ylim=(0, 1))
    figure.savefig(folder / PLOT_FILE, dpi=120)


class ProgressBar:
    """Context manager that displays steps, loss, tokens per second and the remaining time.

    Args:
      console: Console on which the bar is displayed.
      step: Number of steps that are already complete.
      max_steps: Total number of steps in the run.
    """

    def __init__(self, console: Console, step: int, max_steps: int):
        self._console, self._max_steps = console, max_steps
        self._progress = throughput_bar(console, TextColumn("loss {task.fields[loss]:.4f}"))
        self._task = self._progress.add_task(
            "", total=max_steps, completed=step, loss=0.0, rate=0.0
        )
        self._tokens = self._seconds = 0.0
        self._loss: Array | None = None
        self._last_update = self._last_line = time.perf_counter()

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, step: int, num_tokens: int, loss: Array) -> float:
        """Display a dispatched step, and return the number of tokens per second.

        The displayed loss is the loss of the previous step, so that this function does not wait for
        the current step.
        """
        previous, self._loss = self._loss, loss
        shown = float(loss if previous is None else previous)  # waits for the previous step
        now = time.perf_counter()
        keep = 1 - SMOOTHING
        self._tokens = keep * self._tokens + num_tokens
        self._seconds = keep * self._seconds + now - self._last_update
        rate, self._last_update = self._tokens / self._seconds, now
        self._progress.update(self._task, completed=step, loss=shown, rate=rate)
        if not self._console.is_terminal and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.print(f"step {step} of {self._max_steps}: loss {shown:.4f}, {rate:,.0f} tokens/s")
        return rate

    def print(self, message: str) -> None:
        """Print a line above the bar."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)
