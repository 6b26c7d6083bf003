"""Options and output functions that the commands share."""

import os
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import jax
import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ovis_jax.checkpoint.checkpoint_problems import CheckpointValidationError, escape_unprintable
from ovis_jax.errors import CheckpointError, ConfigError, OvisError, install_command
from ovis_jax.model.kv_cache import KVCacheDtype
from ovis_jax.quantization import QuantizationFormat

INTERRUPTED = 4
"""Exit code of a command that was interrupted and can be resumed by running it again."""

SECONDS_BETWEEN_LINES = 60
"""If the output is not a terminal, a long run prints a line at this interval instead of a bar."""

Dtype = Literal["float32", "bfloat16", "float16"]
"""The dtypes that parameters can be cast to."""

ModelOption = Annotated[
    str,
    typer.Option(
        help="Converted folder, folder in the Hub's layout, repo id, or the bundled ovis-tiny."
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        help="Dtype of the computation; by default, the checkpoint's dtype. Gemma2 rejects float16;"
        " its float16 checkpoints run in bfloat16."
    ),
]
QuantizationOption = Annotated[
    QuantizationFormat | None,
    typer.Option(help="Format to quantize the matrices to; by default, they stay as stored."),
]
KVCacheDtypeOption = Annotated[
    KVCacheDtype,
    typer.Option(
        help='Dtype of the KV cache: "auto" for that of the computation, or "int8" for half the'
        " size of bfloat16."
    ),
]
AdaptersOption = Annotated[
    Path | None, typer.Option(help="Folder of LoRA adapters to attach, from ovis-jax or PEFT.")
]
TensorParallelOption = Annotated[
    int, typer.Option(min=1, help="Number of devices to shard the model over.")
]
MaxPartitionOption = Annotated[
    int, typer.Option(min=1, help="Maximum number of grid cells that an image is split into.")
]
MaxNewTokensOption = Annotated[
    int, typer.Option(min=1, help="Maximum number of tokens per answer.")
]
MaxNumSeqsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Maximum number of answers generated at the same time. The default is as many as fit"
        " the memory of the devices, at most 64, or 8 on a CPU.",
    ),
]
MaxModelLenOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Maximum total length of a prompt and its answer, in positions. The default is the"
        " model's own maximum, or the longest that fits the memory of the devices.",
    ),
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Number of rows per batch.")]
TemperatureOption = Annotated[
    float | None,
    typer.Option(help="Sampling temperature; by default, decoding is greedy."),
]
TopPOption = Annotated[
    float | None,
    typer.Option(help="Top-p sampling: keep the likeliest tokens up to this total probability."),
]
TopKOption = Annotated[
    int | None, typer.Option(help="Sample only from this many of the most likely tokens.")
]
RepetitionPenaltyOption = Annotated[
    float | None,
    typer.Option(help="Penalty for tokens that are already in the answer; 1 means no penalty."),
]
SeedOption = Annotated[int, typer.Option(help="Random seed for sampling.")]


def throughput_bar(console: Console, *columns: TextColumn) -> Progress:
    """Return a progress bar with a field `rate` in tokens/s; without a terminal, it is hidden."""
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
    )


@contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C while the block runs, so that the block can clean up."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def parse_image_path(text: str) -> str:
    """Return the path of an image that a user typed, pasted or dropped on the terminal.

    A leading "~" becomes the home folder. If no file has exactly this name, quotes and backslashes
    are removed as in a shell. Spaces need no quotes.
    """
    path = os.path.expanduser(text)
    return path if os.path.exists(path) else os.path.expanduser(_without_quotes(text))


def _without_quotes(text: str) -> str:
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace = lexer.commenters = ""
    lexer.whitespace_split = True
    try:
        return "".join(lexer)
    except ValueError:  # a lone quote or a final backslash belongs to the name
        return text


def model_display_name(model: str) -> str:
    """Return the name of a model for display: the name of the folder, or the repo id."""
    return Path(model).resolve().name if Path(model).is_dir() else model


@contextmanager
def exit_on_error() -> Iterator[None]:
    """If the block raises an error, print it on stderr and exit with the error's exit code.

    docs/index.md lists the exit codes of all commands.
    """
    try:
        yield
    except (OvisError, OSError) as error:
        print_error(Console(stderr=True, highlight=False), error)
        if isinstance(error, OSError):
            sys.exit(3)
        sys.exit(1 if isinstance(error, CheckpointError | ConfigError) else 2)
    except (RuntimeError, AssertionError):
        problem = _why_jax_cannot_start()
        if problem is None:
            raise
        print_error(Console(stderr=True, highlight=False), problem)
        sys.exit(2)


def _why_jax_cannot_start() -> str | None:
    """Return why JAX finds no device, or None if it finds one."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError if a plugin is not installed
        reason = str(error).partition(" (set ")[0] or "its plugin is not installed"
        if not (platforms := os.environ.get("JAX_PLATFORMS")):
            return f"JAX cannot start: {reason}"
        return (
            f"JAX cannot start with JAX_PLATFORMS={platforms!r}: {reason}; unset JAX_PLATFORMS, or "
            f"install the plugin: {install_command('cuda12', 'cuda13', 'tpu')}"
        )
    return None


def print_error(console: Console, error: object) -> None:
    """Print an error in one line; the problems of a checkpoint follow in a table."""
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
    """Print a table of literal text. If the output is not a terminal, the lines are not wrapped."""
    table = Table(*columns)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        # Keys come from files, so they must not be parsed as markup.
        table.add_row(*(Text(escape_unprintable(cell)) for cell in row))
    print_unwrapped(console, table)


def print_unwrapped(console: Console, table: Table) -> None:
    """Print a table. If the output is not a terminal, the lines are not wrapped."""
    if not console.is_terminal:  # a file or pipe has no width that a table must fit
        widest = console.options.update(max_width=10_000)
        width = Measurement.get(console, widest, table).maximum
        console = Console(file=console.file, width=width)
    console.print(table)
