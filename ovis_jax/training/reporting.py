"""Progress reports for a training run: metrics, samples, TensorBoard, a plot, a progress bar."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import Array
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import TextColumn
from tensorboardX import SummaryWriter

from ovis_jax.console import SECONDS_BETWEEN_LINES, throughput_bar

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
PLOT_FILE = "loss.png"
SMOOTHING = 0.05
"""The displayed rate is an exponential moving average over about 1 / SMOOTHING steps."""


class AnswerSample(NamedTuple):
    """A model's answer to a validation row.

    Attributes:
      row: Name of the row.
      question: The last question in the row.
      expected: The expected answer.
      generated: The model's answer.
    """

    row: str
    question: str
    expected: str
    generated: str

    def describe(self) -> str:
        """Return a line with shortened texts, in which control characters are escaped."""
        texts = (
            json.dumps(text if len(text) <= 200 else f"{text[:200]}...", ensure_ascii=False)
            for text in self[1:]
        )
        return "  {}: expected {}, generated {}".format(*texts)


class MetricsWriter:
    """Writes the metrics of a run and samples of answers to the run's folder.

    Args:
      folder: Output folder of the run.
      step: Step at which the run starts or resumes. Lines from later steps are removed.
    """

    def __init__(self, folder: Path, step: int):
        self._folder = folder
        self._path, self._samples_path = folder / METRICS_FILE, folder / SAMPLES_FILE
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        _write_lines(self._path, kept)
        if self._samples_path.exists():
            # A validation whose accuracy is missing is repeated.
            validated = {line["step"] for line in kept if "accuracy" in line}
            samples = [x for x in _read_lines(self._samples_path) if x["step"] in validated]
            _write_lines(self._samples_path, samples)
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Write the metrics of a step, which are numbers or dicts of numbers by name."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            numbers = value if isinstance(value, dict) else {"": value}
            for key, number in numbers.items():
                self._tensorboard.add_scalar(f"{name}/{key}".strip("/"), number, step)

    def write_samples(self, step: int, samples: Sequence[AnswerSample]) -> None:
        """Write answers of a step to samples.jsonl, and as texts to TensorBoard."""
        with self._samples_path.open("a", encoding="utf-8") as file:
            for sample in samples:
                line = {"step": step, **sample._asdict()}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        for number, sample in enumerate(samples, 1):
            text = "\n\n".join(f"{name}: {value}" for name, value in sample._asdict().items())
            self._tensorboard.add_text(f"samples/{number}", text, step)

    def close(self) -> None:
        """Close the files and draw the plot."""
        self._tensorboard.close()
        plot_metrics(self._folder)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run, without an incomplete last line."""
    path = folder / METRICS_FILE
    return _read_lines(path) if path.exists() else []


def _read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


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

    Without a terminal, a line is printed about once per minute instead.

    Args:
      console: Console on which the bar is displayed.
      step: Number of steps that are already complete.
      max_steps: Total number of steps in the run.
      peak_flops: Peak rate of a device in FLOPs per second; None if it is unknown.
    """

    def __init__(
        self, console: Console, step: int, max_steps: int, peak_flops: float | None = None
    ):
        self._console, self._max_steps, self._peak_flops = console, max_steps, peak_flops
        self._progress = throughput_bar(console, TextColumn("loss {task.fields[loss]:.4f}"))
        self._task = self._progress.add_task(
            "", total=max_steps, completed=step, loss=0.0, rate=0.0
        )
        self._steps = self._tokens = self._flops = self._seconds = 0.0
        self._loss: Array | None = None
        self._last_update = self._last_line = time.perf_counter()

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, step: int, num_tokens: int, flops: float, loss: Array) -> dict[str, float]:
        """Display a dispatched step.

        The displayed loss is the loss of the previous step, so that this function does not wait for
        the current step.

        Args:
          step: Number of the step.
          num_tokens: Number of positions in the step, without padding.
          flops: Model FLOPs of the step on each device.
          loss: Loss of the step.

        Returns:
          Averages over the latest steps: `tokens_per_second`; `tflops_per_device`, in 10^12 model
          FLOPs per second; and `mfu`, the fraction of the peak, if the peak is known.
        """
        previous, self._loss = self._loss, loss
        shown = float(loss if previous is None else previous)  # waits for the previous step
        now = time.perf_counter()
        keep = 1 - SMOOTHING
        self._steps = keep * self._steps + 1
        self._tokens = keep * self._tokens + num_tokens
        self._flops = keep * self._flops + flops
        self._seconds = keep * self._seconds + now - self._last_update
        self._last_update = now
        rate, flop_rate = self._tokens / self._seconds, self._flops / self._seconds
        self._progress.update(self._task, completed=step, loss=shown, rate=rate)
        rates = {"tokens_per_second": rate, "tflops_per_device": flop_rate / 1e12}
        speed = f"{rate:,.0f} tokens/s, {flop_rate / 1e12:,.3g} TFLOP/s per device"
        if self._peak_flops is not None:
            rates["mfu"] = flop_rate / self._peak_flops
            speed += f", MFU {rates['mfu']:.1%}"
        left = timedelta(seconds=round((self._max_steps - step) * self._seconds / self._steps))
        self.print_at_intervals(
            f"step {step} of {self._max_steps}: loss {shown:.4f}, {speed}, {left} left"
        )
        return rates

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wait for the current step, and exclude the time of the block from the speed."""
        jax.block_until_ready(self._loss)
        start = time.perf_counter()
        yield
        self._last_update += time.perf_counter() - start

    def print(self, message: str) -> None:
        """Print a line above the bar."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def print_at_intervals(self, message: str) -> None:
        """Print a line if there is no terminal and the last such line is a minute old."""
        now = time.perf_counter()
        if not self._console.is_terminal and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.print(message)
