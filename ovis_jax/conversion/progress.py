"""What a conversion prints: a plan for a dry run, and a progress bar."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ovis_jax.checkpoint.key_map import MatchedTensors
from ovis_jax.checkpoint.safetensors_reader import DTYPES
from ovis_jax.checkpoint.safetensors_writer import ChunkReader, TensorSpecs, total_bytes
from ovis_jax.console import print_table

ProgressCallback = Callable[[str, int, int], None]
"""Called with the tensor being written, the bytes written so far and the total bytes."""


def print_conversion_plan(
    console: Console,
    matched: MatchedTensors,
    tensors: TensorSpecs,
    shards: Mapping[str, list[str]],
) -> None:
    """Print the parameter of every source tensor, the reasons for unused ones, and the totals."""
    parameters = [(info, path) for path, info in matched.sources.items()]
    unused = [(info, f"not used: {reason}") for info, reason in matched.unused]
    rows = [
        (info.key, str(list(info.shape)), info.dtype, target)
        for info, target in [*parameters, *unused]
    ]
    rows += [(key, "", "", "not used, and not in the files") for key in matched.absent]
    print_table(console, ["source key", "shape", "dtype", "parameter"], rows)
    dtype = DTYPES[next(iter(tensors.values()))[0]].name
    console.print(
        f"{len(parameters) + len(unused)} source keys, {len(unused)} of them not used;"
        f" {len(tensors)} parameters, {total_bytes(tensors):,} bytes as {dtype} in"
        f" {len(shards)} shard(s); dry run: nothing was written",
        soft_wrap=True,
    )


@contextmanager
def progress_bar(
    console: Console, title: str, *, visible: bool = True
) -> Iterator[ProgressCallback]:
    """Show a bar of the bytes written while the block runs, if the console is a terminal."""
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
      read_tensor: the reader.
      callback: receives the progress; None for no reports.
      done: bytes that an earlier attempt has written.
      total: bytes of all tensors.
    """

    def read(name: str) -> Iterator[memoryview]:
        nonlocal done
        for chunk in read_tensor(name):
            yield chunk
            done += len(chunk)
            if callback is not None:
                callback(name, done, total)

    return read
