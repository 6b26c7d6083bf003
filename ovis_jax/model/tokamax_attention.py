"""Flash attention from the tokamax library, for NVIDIA GPUs of the Ampere generation or newer.

tokamax runs a Mosaic kernel on Hopper and Blackwell, and a Triton kernel on older GPUs. Both
support soft capping, sliding windows and grouped-query attention, and both skip blocks of masked
keys. On other platforms, tokamax runs the same call in plain JAX, which is slow and only meant for
tests.
"""

import logging
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import tokamax
from absl import flags
from jax import Array
from jax.extend.backend import get_default_device
from jaxtyping import Float, Int

from ovis_jax.model import blockwise_attention
from ovis_jax.model.plain_attention import run_kernel_per_device

IMPLEMENTATIONS = ("mosaic", "triton")
"""tokamax's names for its kernels. The first kernel that the device supports is used."""

TILE = 128
"""Lengths are padded to a multiple of this number, which is the number of queries per tile in the
Mosaic kernel."""

# tokamax logs this for every block, but the defaults work well and users cannot change them.
logging.getLogger("absl").addFilter(
    lambda record: not str(record.msg).startswith("Autotuning cache miss")
)


def attend_prompt(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    positions: Int[Array, "B T"],
    *,
    window: int | None,
    scale: float,
    cap: float | None,
) -> Float[Array, "B T N H"]:
    """Compute causal attention for full prompts, as `blockwise_attention.attend_prompt` does.

    The gradient is computed by `blockwise_attention`, because some tokamax kernels have no gradient
    with soft capping.

    Raises:
      ExceptionGroup: The device supports none of the kernels.
    """
    options = {"window": window, "scale": scale, "cap": cap}

    @jax.custom_vjp
    def attend(q: Array, k: Array, v: Array, positions: Array) -> Array:
        return _attend(q, k, v, positions, **options)

    def forward(*arrays: Array) -> tuple[Array, tuple[Array, ...]]:
        return attend(*arrays), arrays

    def backward(arrays: tuple[Array, ...], out: Array) -> tuple[Array | None, ...]:
        blockwise = partial(blockwise_attention.attend_prompt, **options)
        # Positions are integers and have no gradient.
        return *jax.vjp(lambda *x: blockwise(*x, arrays[3]), *arrays[:3])[1](out), None

    attend.defvjp(forward, backward)
    return attend(q, k, v, positions)


def _attend(
    q: Array, k: Array, v: Array, positions: Array, window: int | None, scale: float, cap: Any
) -> Array:
    """Pad the arrays, run the kernel on each device, and remove the padding."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # keeps tokamax from parsing the caller's command line
    implementation = IMPLEMENTATIONS if get_default_device().platform == "gpu" else "xla"
    T = q.shape[1]
    padding = (0, -T % TILE)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), padding, (0, 0))) for x in (q.swapaxes(1, 2), k, v))
    positions = jnp.pad(positions, ((0, 0), padding), constant_values=-1)

    def device(q: Array, k: Array, v: Array, positions: Array) -> Array:
        real = positions >= 0
        out = tokamax.dot_product_attention(
            *(x.swapaxes(1, 2) for x in (q, k, v)),
            mask=real[:, None, None, :],
            is_causal=True,
            # Columns in a row differ by as much as their positions.
            local_window_size=None if window is None else (window - 1, 0),
            scale=scale,
            logits_soft_cap=cap,
            implementation=implementation,
        )
        # In a padded row, no key may be visible, and a softmax over no keys is NaN.
        return jnp.where(real[:, :, None, None], out, 0).swapaxes(1, 2)

    return run_kernel_per_device(device, q, k, v, positions)[:, :, :T].swapaxes(1, 2)
