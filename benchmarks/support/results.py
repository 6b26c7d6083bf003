"""Output of benchmark results: tables, JSON files and plots."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from benchmarks.support.machine_peaks import describe_machine

JsonOption = Annotated[
    Path | None, typer.Option("--json", help="JSON file to write the results to.")
]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", help="PNG file to write a plot of the results to.")
]


def print_results(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; all columns but the first are right-aligned."""
    table = Table(
        *(Column(name, justify="right" if n else "left") for n, name in enumerate(columns)),
        title=title,
        title_justify="left",
    )
    for row in rows:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else escape(str(x)) for x in row))
    Console().print(table)


def write_results(
    path: Path | None, machine_facts: Mapping[str, Any] | None = None, **fields: Any
) -> None:
    """Write a JSON file, unless the path is None.

    Args:
      path: file to write.
      machine_facts: facts to add to the description of the machine.
      fields: all other fields.
    """
    if path is not None:
        fields = {"machine": describe_machine(**(machine_facts or {})), **fields}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(fields, indent=2) + "\n")


def plot_results(
    path: Path,
    title: str,
    labels: Sequence[Any],
    series: Mapping[str, Sequence[float]],
    unit: str,
    *,
    lines: bool = False,
    reference: float | None = None,
) -> None:
    """Plot series of values as a PNG file. Requires the extra `train`.

    Args:
      path: file to write.
      title: title of the plot.
      labels: x-axis labels, one per value of a series.
      series: values by name.
      unit: label of the y-axis.
      lines: draw lines instead of bars.
      reference: y value of a dashed horizontal line.
    """
    from matplotlib.figure import Figure  # matplotlib is optional

    figure = Figure(figsize=(max(6.0, 0.5 * len(labels) * max(1, len(series) / 2)), 4.5))
    axes = figure.subplots()
    positions, width = np.arange(len(labels)), 0.8 / max(1, len(series))
    for number, (name, values) in enumerate(series.items()):
        if lines:
            axes.plot(labels, values, marker="o", label=name)
        else:
            axes.bar(positions + (number + 0.5) * width - 0.4, values, width, label=name)
    if not lines:
        axes.set_xticks(positions, [str(label) for label in labels], rotation=30, ha="right")
    if reference is not None:
        axes.axhline(reference, color="black", linestyle="--", linewidth=1)
    axes.set(title=title, ylabel=unit)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
