"""What the commands share: options, names, and how they say what is wrong."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ovis_jax.checkpoint.problems import CheckpointProblems, printable

Dtype = Literal["float32", "bfloat16", "float16"]
"""What parameters may be cast to."""

Model = Annotated[
    str,
    typer.Option(help="A converted folder, a folder or repo id in the Hub's layout, or ovis-tiny."),
]
OtherDtype = Annotated[Dtype | None, typer.Option(help="Compute in this dtype, not as stored.")]
Adapters = Annotated[Path | None, typer.Option(help="A folder of low-rank adapters.")]
TensorParallel = Annotated[int, typer.Option(min=1, help="Devices to cut the model over.")]
MaxPartition = Annotated[int, typer.Option(min=1, help="The most cells that an image is cut into.")]


def model_name(model: str) -> str:
    """What a model is called before others: its folder's own name, or the whole repo id."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def print_error(console: Console, error: object) -> None:
    """Print what is wrong in one line; the faults of a checkpoint in a table below it."""
    message = error
    if isinstance(error, CheckpointProblems):
        message = error.summary
    elif isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f": {error.filename}"
        message = f"{error.strerror}{where}"
    text = " ".join(printable(line.strip()) for line in str(message).splitlines())
    console.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)
    if isinstance(error, CheckpointProblems):
        rows = [
            (row.file, row.key or "(whole file)", row.problem, row.expected, row.found)
            for row in error.problems
        ]
        print_table(console, ["file", "key", "problem", "expected", "found"], rows)


def print_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table whose cells are taken as they are; never cut off where there is no terminal."""
    table = Table(*columns)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        # As text, not as markup: keys come out of files.
        table.add_row(*(Text(printable(cell)) for cell in row))
    if not console.is_terminal:  # a file or pipe has no width to fold a table into
        widest = console.options.update(max_width=10_000)
        width = Measurement.get(console, widest, table).maximum
        console = Console(file=console.file, width=width)
    console.print(table)
