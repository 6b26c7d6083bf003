"""Options and output that the commands share."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ovis_jax.checkpoint.checkpoint_problems import CheckpointValidationError, escape_unprintable

Dtype = Literal["float32", "bfloat16", "float16"]
"""Dtypes that parameters may be cast to."""

ModelOption = Annotated[
    str,
    typer.Option(
        help="Converted folder, folder or repo id in the Hub's layout, or the bundled ovis-tiny."
    ),
]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="Dtype to compute in; without it, the checkpoint's own.")
]
AdaptersOption = Annotated[Path | None, typer.Option(help="Folder of LoRA adapters to attach.")]
TensorParallelOption = Annotated[
    int, typer.Option(min=1, help="Number of devices to shard the model over.")
]
MaxPartitionOption = Annotated[
    int, typer.Option(min=1, help="Maximum number of cells that an image is cut into.")
]


def model_display_name(model: str) -> str:
    """Return the name to show for a model: the name of its folder, or the repo id."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def print_error(console: Console, error: object) -> None:
    """Print an error in one line, and the problems of a checkpoint in a table below."""
    message = error
    if isinstance(error, CheckpointValidationError):
        message = error.summary
    elif isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f": {error.filename}"
        message = f"{error.strerror}{where}"
    text = " ".join(escape_unprintable(line.strip()) for line in str(message).splitlines())
    console.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)
    if isinstance(error, CheckpointValidationError):
        rows = [
            (row.file, row.key or "(whole file)", row.problem, row.expected, row.found)
            for row in error.problems
        ]
        print_table(console, ["file", "key", "problem", "expected", "found"], rows)


def print_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of literal text. Outside a terminal it is as wide as its content."""
    table = Table(*columns)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        # Text, not markup: keys come from files.
        table.add_row(*(Text(escape_unprintable(cell)) for cell in row))
    if not console.is_terminal:  # a file or pipe has no width to fold a table into
        widest = console.options.update(max_width=10_000)
        width = Measurement.get(console, widest, table).maximum
        console = Console(file=console.file, width=width)
    console.print(table)
