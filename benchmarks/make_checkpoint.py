"""Write a checkpoint with random weights: `python -m benchmarks.make_checkpoint --config 9b DST`.

The checkpoint has the published keys, shapes, dtype and shards. The weights are slices of one array
of random numbers, so that only the disk limits the speed. The same seed gives the same bytes. The
tokenizer is copied from a golden checkpoint.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np
import typer
from rich.console import Console

from benchmarks.support.benchmark_model import PRESETS
from benchmarks.support.random_checkpoints import write_configs_and_tokenizer
from ovis_jax.checkpoint.key_map import make_hub_key_map, unused_tensor_shapes
from ovis_jax.checkpoint.output_dirs import atomic_dir, check_disk_space
from ovis_jax.checkpoint.safetensors_reader import CHUNK_BYTES
from ovis_jax.checkpoint.safetensors_writer import (
    MAX_SHARD_BYTES,
    TensorSpecs,
    count_bytes,
    plan_shards,
    total_bytes,
    write_shards,
)
from ovis_jax.config import OvisConfig
from ovis_jax.sharding import param_shapes

MODULES = ("llm.model.embed", "llm.model.layers", "llm.", "visual_tokenizer.backbone", "visual", "")
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "")
RANDOM_BYTES = 1 << 26


def list_published_tensors(config: OvisConfig) -> TensorSpecs:
    """Return all tensors of the Hub's layout in bfloat16, in the order of the published files."""
    shapes = param_shapes(config)
    tensor_shapes = {key: shapes[path] for key, path in make_hub_key_map(config).parameters.items()}
    tensor_shapes |= unused_tensor_shapes(config)

    def order(key: str) -> tuple[int, int, int]:
        module = next(n for n, prefix in enumerate(MODULES) if key.startswith(prefix))
        layer = re.search(r"\.layers\.(\d+)\.", key)
        matrix = next(n for n, name in enumerate(MATRICES) if name in key)
        return module, int(layer[1]) if layer else 0, matrix

    return {key: ("BF16", tensor_shapes[key]) for key in sorted(tensor_shapes, key=order)}


def write_random_checkpoint(
    config: OvisConfig, folder: Path, seed: int = 0, max_shard_bytes: int = MAX_SHARD_BYTES
) -> int:
    """Write a checkpoint with random weights, and return the bytes of its weights.

    Raises:
      OvisError: the folder exists and is not empty.
      OSError: the disk has too little space, or a file cannot be written.
    """
    tensors = list_published_tensors(config)
    total = total_bytes(tensors)
    check_disk_space(folder, total)
    rng = np.random.default_rng(seed)
    numbers = rng.normal(scale=0.02, size=RANDOM_BYTES // 2).astype(ml_dtypes.bfloat16)
    data = numbers.view(np.uint8).data

    def read_tensor(key: str) -> Iterator[memoryview]:
        remaining = count_bytes(*tensors[key])
        while remaining:
            size = min(remaining, CHUNK_BYTES)
            start = 2 * int(rng.integers((len(data) - size) // 2 + 1))
            yield data[start : start + size]
            remaining -= size

    with atomic_dir(folder) as partial:
        shards = plan_shards(tensors, max_shard_bytes)
        write_shards(partial, tensors, read_tensor, shards, metadata={"format": "pt"})
        write_configs_and_tokenizer(partial, config, "bfloat16")
    return total


def main(
    folder: Annotated[Path, typer.Argument(metavar="DST", help="Folder to create.")],
    config: Annotated[str, typer.Option(help="Config: " + ", ".join(PRESETS) + ".")] = "9b",
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write a checkpoint in the Hub's layout with random weights."""
    if config not in PRESETS:
        raise typer.BadParameter(f"{config!r}, expected one of {', '.join(PRESETS)}")
    total = write_random_checkpoint(PRESETS[config](), folder, seed)
    Console().print(f"{folder}: {total:,} bytes of weights", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
