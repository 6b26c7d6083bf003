"""What a conversion shows: its plan in a dry run, and a bar while it runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from convert.transfer import OnProgress
from ovis_jax.checkpoint.keymap import Plan
from ovis_jax.checkpoint.safetensors_files import DTYPES
from ovis_jax.checkpoint.writer import Tensors, tensor_bytes
from ovis_jax.console import print_table


def print_plan(console: Console, plan: Plan, tensors: Tensors, shards: Mapping[str, object]):
    """Print where every tensor goes, the unused ones with the reason, and the sums."""
    rows = [
        (entry.key, str(list(entry.shape)), entry.dtype, path)
        for path, entry in plan.sources.items()
    ]
    rows += [
        (entry.key, str(list(entry.shape)), entry.dtype, f"not used: {why}")
        for entry, why in plan.unused
    ]
    rows += [(key, "", "", "not used, and not in the files") for key in plan.absent]
    print_table(console, ["source key", "shape", "dtype", "parameter"], rows)
    size = sum(tensor_bytes(*tensor) for tensor in tensors.values())
    dtype = DTYPES[next(iter(tensors.values()))[0]].name
    console.print(
        f"{len(plan.sources) + len(plan.unused)} source keys, {len(plan.unused)} of them not used;"
        f" {len(tensors)} parameters, {size:,} bytes as {dtype} in {len(shards)} shard(s);"
        " dry run: nothing was written",
        soft_wrap=True,
    )


@contextmanager
def progress_bar(console: Console, title: str, *, shown: bool = True) -> Iterator[OnProgress]:
    """A bar of the bytes written, on a terminal only; the block calls what it is given."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda _, done, total: bar.update(task, completed=done, total=total)
