"""Flash attention of the tokamax library, for NVIDIA GPUs from Ampere on.

On Hopper and Blackwell it is a Mosaic kernel, else one in Triton. Both take soft cap, window and
grouped heads, and read no block of keys that is hidden. On other platforms tokamax's plain form of
the same call runs instead, slowly: for tests.
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

from ovis_jax.model import blockwise
from ovis_jax.model.shards import on_each_device

IMPLEMENTATIONS = ("mosaic", "triton")
"""The first that the device can run."""

TILE = 128
"""Columns are padded to a multiple: the Mosaic kernel takes queries in pieces of so many."""

# Of every block, and nothing that a user could do anything about: its rules of thumb serve well.
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
    """Attention of whole prompts over themselves: see `blockwise.attend_prompt`.

    Its gradient is that of `blockwise`, too: tokamax has none with a soft cap everywhere.

    Raises:
      ExceptionGroup: no kernel can run on the device.
    """
    how = {"window": window, "scale": scale, "cap": cap}

    @jax.custom_vjp
    def attend(q: Array, k: Array, v: Array, positions: Array) -> Array:
        return _attend(q, k, v, positions, **how)

    def forward(*arrays: Array) -> tuple[Array, tuple[Array, ...]]:
        return attend(*arrays), arrays

    def backward(arrays: tuple[Array, ...], out: Array) -> tuple[Array | None, ...]:
        same = partial(blockwise.attend_prompt, **how)
        # Of the arrays all but positions have one.
        return *jax.vjp(lambda *x: same(*x, arrays[3]), *arrays[:3])[1](out), None

    attend.defvjp(forward, backward)
    return attend(q, k, v, positions)


def _attend(
    q: Array, k: Array, v: Array, positions: Array, window: int | None, scale: float, cap: Any
) -> Array:
    """Pad, run on each device of a mesh what lies there, and cut the padding off."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # or tokamax takes the caller's command line for its own
    chosen = IMPLEMENTATIONS if get_default_device().platform == "gpu" else "xla"
    T = q.shape[1]
    more = (0, -T % TILE)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), more, (0, 0))) for x in (q.swapaxes(1, 2), k, v))
    positions = jnp.pad(positions, ((0, 0), more), constant_values=-1)

    def device(q: Array, k: Array, v: Array, positions: Array) -> Array:
        real = positions >= 0
        out = tokamax.dot_product_attention(
            *(x.swapaxes(1, 2) for x in (q, k, v)),
            mask=real[:, None, None, :],
            is_causal=True,
            # Real columns of a row lie as far apart as their positions.
            local_window_size=None if window is None else (window - 1, 0),
            scale=scale,
            logits_soft_cap=cap,
            implementation=chosen,
        )
        # A padded row may see nothing, and a softmax over nothing is not a number.
        return jnp.where(real[:, :, None, None], out, 0).swapaxes(1, 2)

    return on_each_device(device, q, k, v, positions)[:, :, :T].swapaxes(1, 2)
