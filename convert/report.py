"""What a dry run prints: the plan of a conversion."""

from collections.abc import Mapping

from rich.console import Console

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
