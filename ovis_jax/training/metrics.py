"""What a run measures, as JSON lines, for TensorBoard, and as a plot at its end."""

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"


class Metrics:
    """The measurements of a run, written to its folder as they come.

    Args:
      folder: of the run.
      step: where the run begins or is taken up again; what was written of later steps goes.
    """

    def __init__(self, folder: Path, step: int):
        self._folder = folder
        self._path = folder / METRICS_FILE
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write numbers, and tables of numbers by name, of a step."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            for part, number in parts:
                self._board.add_scalar(f"{name}/{part}".strip("/"), number, step)

    def close(self) -> None:
        """End, and draw the plot."""
        self._board.close()
        plot(self._folder)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines that a run has written; a last line that was cut short is left out."""
    path = folder / METRICS_FILE
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot(folder: Path) -> None:
    """Draw loss and held-out accuracy over steps into the run's folder."""
    lines = read_metrics(folder)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    axes.plot(*zip(*losses, strict=True) if losses else ([], []), color="tab:blue", linewidth=1)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    scores = [(line["step"], line["accuracy"]) for line in lines if "accuracy" in line]
    if scores:
        right = axes.twinx()
        right.plot(*zip(*scores, strict=True), color="tab:orange", marker="o", markersize=3)
        right.set(ylabel="exact match on held-out rows, mean of the kinds", ylim=(0, 1))
    figure.savefig(folder / PLOT_FILE, dpi=120)
