"""Output of a conversion: a progress bar, and a note if the conversion is interrupted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ovis_jax.checkpoint.safetensors_writer import ChunkReader
from ovis_jax.console import INTERRUPTED, interrupt_on_sigterm, print_error

ProgressCallback = Callable[[str, int, int], None]
"""A function that is called with the current tensor's name, the bytes written, and the total."""


@contextmanager
def exit_on_interrupt(destination: Path) -> Iterator[None]:
    """On Ctrl-C or SIGTERM, let the block clean up, then exit with the code `INTERRUPTED`.

    Args:
      destination: Output folder of the command.
    """
    try:
        with interrupt_on_sigterm():
            yield
    except KeyboardInterrupt:
        message = f"interrupted; {destination} was not written; the same command resumes"
        print_error(Console(stderr=True), message)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def progress_bar(title: str, *, visible: bool = True) -> Iterator[ProgressCallback]:
    """Show a progress bar of the bytes written while the block runs, if stderr is a terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    disabled = not (visible and console.is_terminal)
    with Progress(*columns, console=console, disable=disabled) as bar:
        task = bar.add_task(title, total=None)
        yield lambda _, done, total: bar.update(task, completed=done, total=total)


def report_progress(
    read_tensor: ChunkReader, callback: ProgressCallback | None, done: int, total: int
) -> ChunkReader:
    """Wrap a chunk reader so that it reports every chunk.

    Args:
      read_tensor: The reader.
      callback: Called with the progress; None for no reports.
      done: Number of bytes that an earlier attempt has written.
      total: Number of bytes in all tensors.
    """

    def read(name: str) -> Iterator[memoryview]:
        nonlocal done
        for chunk in read_tensor(name):
            yield chunk
            done += len(chunk)
            if callback is not None:
                callback(name, done, total)

    return read
