"""A checkpoint as large as the published: `python -m benchmarks.make_checkpoint --config 9b DST`.

It has exactly the published keys, shapes, dtype and shards, and random weights. They are cut from
one pool of random numbers, so that it is made as fast as the disk writes, and the same seed makes
the same bytes. Its tokenizer is that of a golden checkpoint.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np
import typer
from rich.console import Console

from benchmarks.checkpoints import write_small_files
from benchmarks.models import PRESETS
from ovis_jax.checkpoint.keymap import hub_keys, unused_shapes
from ovis_jax.checkpoint.safetensors_files import CHUNK
from ovis_jax.checkpoint.writer import (
    MAX_SHARD_BYTES,
    Tensors,
    check_space,
    tensor_bytes,
    whole_or_absent,
    write_tensors,
)
from ovis_jax.config import OvisConfig
from ovis_jax.sharding import param_shapes

MODULES = ("llm.model.embed", "llm.model.layers", "llm.", "visual_tokenizer.backbone", "visual", "")
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "")
POOL_BYTES = 1 << 26


def hub_tensors(config: OvisConfig) -> Tensors:
    """Every tensor of the Hub's layout in the order of the published files, in bfloat16."""
    shapes = param_shapes(config)
    found = {key: shapes[path] for key, path in hub_keys(config).parameters.items()}
    found |= unused_shapes(config)

    def order(key: str) -> tuple[int, int, int]:
        module = next(n for n, prefix in enumerate(MODULES) if key.startswith(prefix))
        layer = re.search(r"\.layers\.(\d+)\.", key)
        matrix = next(n for n, name in enumerate(MATRICES) if name in key)
        return module, int(layer[1]) if layer else 0, matrix

    return {key: ("BF16", found[key]) for key in sorted(found, key=order)}


def make(
    config: OvisConfig, folder: Path, seed: int = 0, max_shard_bytes: int = MAX_SHARD_BYTES
) -> int:
    """Write the checkpoint; gives its bytes of weights.

    Raises:
      OvisError: the folder exists and is not empty.
      OSError: the disk is too small, or a file cannot be written.
    """
    tensors = hub_tensors(config)
    total = sum(tensor_bytes(*tensor) for tensor in tensors.values())
    check_space(folder, total)
    rng = np.random.default_rng(seed)
    pool = rng.normal(scale=0.02, size=POOL_BYTES // 2).astype(ml_dtypes.bfloat16)
    pool = pool.view(np.uint8).data

    def chunks(key: str) -> Iterator[memoryview]:
        left = tensor_bytes(*tensors[key])
        while left:
            size = min(left, CHUNK)
            start = 2 * int(rng.integers((len(pool) - size) // 2 + 1))
            yield pool[start : start + size]
            left -= size

    with whole_or_absent(folder) as partial:
        write_tensors(partial, tensors, chunks, max_shard_bytes, {"format": "pt"})
        write_small_files(partial, config, "bfloat16")
    return total


def main(
    folder: Annotated[Path, typer.Argument(metavar="DST")],
    config: Annotated[str, typer.Option(help="One of " + ", ".join(PRESETS))] = "9b",
    seed: int = 0,
) -> None:
    """Write a checkpoint in the Hub's layout with random weights."""
    if config not in PRESETS:
        raise typer.BadParameter(f"{config!r}; there are {', '.join(PRESETS)}")
    total = make(PRESETS[config](), folder, seed)
    Console().print(f"{folder}: {total:,} bytes of weights", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
