"""The attention kernels of prompts compiled for GPUs that need not be there.

`python -m benchmarks.gpu_kernels`, where `jax-cuda12-plugin`, `jax-cuda12-pjrt`,
`nvidia-cuda-nvcc-cu12` and `tokamax` are installed: heads and lengths of all kinds, in a batch,
under `vmap` and with a gradient; exit code 1 where the kernel is not in the program. Nothing is
executed.
"""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import typer
from jax import Array

from benchmarks.measure import print_table
from ovis_jax.model.kernels import attend_prompt
from ovis_jax.plan.compiler import devices_of
from ovis_jax.plan.devices import find_topology
from ovis_jax.plan.program import kernels

TARGETS = {"h100:1": "mosaic", "a100:1": "triton"}
"""Topologies, and what a kernel's name has in it there."""

HEADS = [(16, 8, 256), (32, 16, 128), (4, 2, 32), (4, 2, 16), (4, 2, 24)]
"""Query heads, key heads and their size: of the 9B, of the 27B, of ovis-tiny, and others."""

LENGTHS = [129, 323, 1024]


def attend(q: Array, k: Array, v: Array, positions: Array, window: int | None) -> Array:
    """Attention as the decoder calls it."""
    how = {"scale": 0.1, "cap": 50.0, "setting": "gpu"}
    return attend_prompt(q, k, v, positions, window=window, **how)  # pyright: ignore


def summed(q: Array, k: Array, v: Array, positions: Array, window: int | None) -> Array:
    """A number that has a gradient."""
    return attend(q, k, v, positions, window).astype(jnp.float32).sum()


def programs(window: int | None) -> dict[str, Callable[..., object]]:
    """What is compiled, of rows [2, T, ...] of everything."""
    one = partial(attend, window=window)

    def alone(q: Array, k: Array, v: Array, positions: Array) -> Array:
        return one(q[None], k[None], v[None], positions[None])

    return {
        "batch": one,
        "vmap": jax.vmap(alone),
        "gradient": jax.value_and_grad(partial(summed, window=window), (0, 1, 2)),
    }


def arguments(N: int, K: int, H: int, T: int) -> list[jax.ShapeDtypeStruct]:
    """Queries, keys, values in bfloat16, and positions, of two rows."""
    shapes = (2, T, N, H), (2, K, T, H), (2, K, T, H)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    return [*arrays, jax.ShapeDtypeStruct((2, T), jnp.int32)]


def main() -> None:
    """Compile everything."""
    rows, failed = [], 0
    for name, expected in TARGETS.items():
        (device, *_) = devices_of(find_topology(name))
        cases = [(heads, T, None, "batch") for heads in HEADS for T in LENGTHS]
        cases += [(HEADS[0], 323, 100, what) for what in programs(100)]
        for heads, T, window, what in cases:
            with jax.default_device(device):
                try:
                    lowered = jax.jit(programs(window)[what]).lower(*arguments(*heads, T))
                    found = kernels(lowered.compile().as_text() or "")
                    good = any(re.search(expected, kernel) for kernel in found)
                    said = ", ".join(found) or "no kernel"
                except Exception as error:  # whatever a compiler may raise
                    good, said = False, f"{type(error).__name__}: {str(error)[:100]}"
            failed += not good
            rows.append([name, str(heads), str(T), str(window), what, said])
    print_table("attention of prompts", ["GPU", "N, K, H", "T", "window", "as", "kernels"], rows)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
