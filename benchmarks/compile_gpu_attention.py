"""Do the attention kernels for prompts compile for GPUs, with various head sizes and lengths?

`python -m benchmarks.compile_gpu_attention` needs `jax-cuda12-plugin`, `jax-cuda12-pjrt`,
`nvidia-cuda-nvcc-cu12` and `tokamax`, but no GPU. It compiles attention for a batch, under `vmap`
and with a gradient. It exits with code 1 if a program lacks the expected kernel. No program is
executed.
"""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import typer
from jax import Array

from benchmarks.support.results import print_results
from ovis_jax.model.attention_kernels import KernelSetting, prompt_attention
from ovis_jax.plan.aot_compile import compile_only_devices
from ovis_jax.plan.hlo_analysis import count_kernel_calls
from ovis_jax.plan.topologies import parse_topology

EXPECTED_KERNELS = {"h100:1": "mosaic", "a100:1": "triton"}
"""Text in the name of the expected kernel, by topology."""

HEADS = [(16, 8, 256), (32, 16, 128), (4, 2, 32), (4, 2, 16), (4, 2, 24)]
"""Query heads, key/value heads and head dim: of the 9B, of the 27B, of ovis-tiny, and others."""

LENGTHS = [129, 323, 1024]


def attend_as_decoder(q: Array, k: Array, v: Array, positions: Array, window: int | None) -> Array:
    """Call prompt attention as the decoder does."""
    options = {"scale": 0.1, "cap": 50.0, "setting": KernelSetting(platform="gpu")}
    return prompt_attention(q, k, v, positions, window=window, **options)  # pyright: ignore


def sum_of_attention(q: Array, k: Array, v: Array, positions: Array, window: int | None) -> Array:
    """Sum the result of attention, as a scalar to differentiate."""
    return attend_as_decoder(q, k, v, positions, window).astype(jnp.float32).sum()


def attention_variants(window: int | None) -> dict[str, Callable[..., object]]:
    """Return the functions to compile, by name; each takes two rows of every argument."""
    attend = partial(attend_as_decoder, window=window)

    def attend_one_row(q: Array, k: Array, v: Array, positions: Array) -> Array:
        return attend(q[None], k[None], v[None], positions[None])

    return {
        "batch": attend,
        "vmap": jax.vmap(attend_one_row),
        "gradient": jax.value_and_grad(partial(sum_of_attention, window=window), (0, 1, 2)),
    }


def abstract_arguments(N: int, K: int, H: int, T: int) -> list[jax.ShapeDtypeStruct]:
    """Describe bfloat16 queries, keys and values, and positions, of two rows."""
    shapes = (2, T, N, H), (2, K, T, H), (2, K, T, H)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    return [*arrays, jax.ShapeDtypeStruct((2, T), jnp.int32)]


def main() -> None:
    """Compile attention for GPUs in all variants, and print the kernels that they use."""
    rows, num_failed = [], 0
    for topology, expected in EXPECTED_KERNELS.items():
        (device, *_) = compile_only_devices(parse_topology(topology))
        cases = [(heads, T, None, "batch") for heads in HEADS for T in LENGTHS]
        cases += [(HEADS[0], 323, 100, variant) for variant in attention_variants(100)]
        for heads, T, window, variant in cases:
            with jax.default_device(device):
                try:
                    jitted = jax.jit(attention_variants(window)[variant])
                    compiled = jitted.lower(*abstract_arguments(*heads, T)).compile()
                    kernels = count_kernel_calls(compiled.as_text() or "")
                    passed = any(re.search(expected, kernel) for kernel in kernels)
                    result = ", ".join(kernels) or "no kernel"
                except Exception as error:  # compilers raise many types
                    passed, result = False, f"{type(error).__name__}: {str(error)[:100]}"
            num_failed += not passed
            rows.append([topology, str(heads), str(T), str(window), variant, result])
    columns = ["GPU", "N, K, H", "T", "window", "variant", "kernels"]
    print_results("attention of prompts", columns, rows)
    if num_failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
