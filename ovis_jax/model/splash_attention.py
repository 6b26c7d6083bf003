"""Splash attention for TPUs, a Pallas kernel that keeps the scores on the chip.

The kernel is `jax.experimental.pallas.ops.tpu.splash_attention`. It supports grouped-query
attention and gradients, and it skips blocks of masked keys. On other platforms, Pallas interprets
the kernel, which is slow and only meant for tests.
"""

from contextlib import nullcontext
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jaxtyping import Float, Int

from ovis_jax.model.plain_attention import run_kernel_per_device

LANES = 128
"""Lengths and head dimensions are padded to a multiple of this number."""

KERNEL_BLOCKS = 512, 256, 128
"""Block sizes for queries and keys. The first size that divides the padded length is used."""


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

    The kernel has no argument for the scale, so `q` is first multiplied by the scale and rounded to
    the dtype of `q`.
    """
    T = q.shape[1]
    size = _padded(T), _padded(T)
    mask = pallas.CausalMask(size) if window is None else pallas.LocalMask(size, (window - 1, 0), 0)
    # Columns in a row differ by as much as their positions. Padding is a separate segment.
    return _attend(q, k, v, (positions >= 0).astype(jnp.int32), mask, scale, cap)


def attend_crops(
    q: Float[Array, "I P A H"],
    k: Float[Array, "I A P H"],
    v: Float[Array, "I A P H"],
    *,
    scale: float,
) -> Float[Array, "I P A H"]:
    """Compute attention of every patch to all patches in its crop."""
    I, P = q.shape[:2]  # noqa: E741
    mask = pallas.FullMask((_padded(P), _padded(P)))
    return _attend(q, k, v, jnp.ones((I, P), jnp.int32), mask, scale, None)


def _padded(size: int) -> int:
    return -(-size // LANES) * LANES


def _block_sizes(length: int) -> pallas.BlockSizes:
    block = next(size for size in KERNEL_BLOCKS if length % size == 0)
    return pallas.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )


def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segments: Int[Array, "B T"],
    mask: pallas.Mask,
    scale: float,
    cap: float | None,
) -> Float[Array, "B T N H"]:
    """Pad the arrays, run the kernel on each device, and remove the padding."""
    T, H = q.shape[1], q.shape[3]
    q = (q.astype(jnp.float32) * scale).astype(q.dtype).swapaxes(1, 2)  # [B, N, T, H]
    padding = mask.shape[0] - T
    widths = (0, 0), (0, 0), (0, padding), (0, _padded(H) - H)
    q, k, v = (jnp.pad(x, widths) for x in (q, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, padding)))

    def run(q: Array, k: Array, v: Array, segments: Array, interpret: bool) -> Array:
        kernel = pallas.make_splash_mha(
            pallas.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=_block_sizes(mask.shape[0]),
            attn_logits_soft_cap=cap,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )

        def row(q: Array, k: Array, v: Array, segments: Array) -> Array:
            return cast(Array, kernel(q, k, v, pallas.SegmentIds(segments, segments)))

        return jax.vmap(row)(q, k, v, segments)

    def device(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return jax.lax.platform_dependent(
            *(q, k, v, segments),
            tpu=lambda *x: run(*x, interpret=False),
            default=lambda *x: run(*x, interpret=True),
        )

    # Products have full float32 precision, except in the gradient, where the context has no effect.
    exact = jax.default_matmul_precision("highest") if q.dtype == jnp.float32 else nullcontext()
    with exact:
        out = run_kernel_per_device(device, q, k, v, segments)
    return out[:, :, :T, :H].swapaxes(1, 2)
