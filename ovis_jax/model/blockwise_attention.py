"""Attention in blocks of queries, in plain JAX, so that no array contains all attention scores.

Each block is plain attention for a few queries, so the results differ from plain attention only by
rounding. The backward pass recomputes the scores of a block instead of storing them.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ovis_jax.model.plain_attention import attend, visible

BLOCK_SIZE = 128
"""Maximum number of queries in a block. Among sizes from 32 to 512, 128 was the fastest on a
CPU."""

NUM_PARTS = 4
"""Number of parts that a prompt is split into. Each part loops over its blocks.

A part reads only the keys that are visible to it. With more parts, more masked scores are skipped
(37 % of all scores with 4 parts, at most 50 %), but compilation takes longer.
"""


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
    """Compute causal attention for full prompts.

    Args:
      q: Queries, after rotary embedding.
      k: Keys of the same tokens.
      v: Values of the same tokens.
      positions: Positions, which increase by one from token to token in each row; -1 at padding,
        which may be on either side. At padding, the result is finite but meaningless.
      window: Number of positions that are visible to a query, including its own; None for no limit.
      scale: Factor by which the scores are multiplied.
      cap: Soft cap of the scaled scores; None for no soft capping.

    Returns:
      The same result as that of `attend` with the mask from `visible`.
    """
    B, T, N, H = q.shape
    if T <= BLOCK_SIZE:
        return attend(q, k, v, visible(positions, positions, window), scale=scale, cap=cap)
    blocks = -(-T // BLOCK_SIZE)
    size = 8 * -(-T // (8 * blocks))  # equal blocks, with little padding in the last one
    padding = blocks * size - T
    queries = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    queries = queries.reshape(B, blocks, size, N, H).swapaxes(0, 1)
    rows = jnp.pad(positions, ((0, 0), (0, padding)), constant_values=-1)
    rows = rows.reshape(B, blocks, size).swapaxes(0, 1)

    @partial(jax.checkpoint, prevent_cse=False)
    def attend_block(q: Array, rows: Array, k: Array, v: Array, columns: Array) -> Array:
        return attend(q, k, v, visible(rows, columns, window), scale=scale, cap=cap)

    out = []
    step = -(-blocks // NUM_PARTS)
    for first in range(0, blocks, step):
        part = slice(first, first + step)
        # Columns in a row differ by as much as their positions, so the window can be applied to
        # columns.
        low = 0 if window is None else max(0, first * size - window + 1)
        seen = slice(low, min((first + step) * size, T))
        keys, values, columns = k[:, :, seen], v[:, :, seen], positions[:, seen]

        def one(block: tuple[Array, Array], seen: tuple = (keys, values, columns)) -> Array:
            return attend_block(*block, *seen)

        out.append(jax.lax.map(one, (queries[part], rows[part])))  # [blocks, B, size, N, H]
    return jnp.concatenate(out).swapaxes(0, 1).reshape(B, blocks * size, N, H)[:, :T]


def attend_crops(
    q: Float[Array, "I P A H"],
    k: Float[Array, "I A P H"],
    v: Float[Array, "I A P H"],
    *,
    scale: float,
) -> Float[Array, "I P A H"]:
    """Compute attention of every patch to all patches in its crop, one crop and head at a time."""
    I, P, A, H = q.shape  # noqa: E741
    if P <= BLOCK_SIZE:
        return attend(q, k, v, None, scale=scale)

    @partial(jax.checkpoint, prevent_cse=False)
    def attend_head(head: tuple[Array, Array, Array]) -> Array:
        q, k, v = head
        return attend(q[None, :, None], k[None, None], v[None, None], None, scale=scale)[0, :, 0]

    heads = tuple(x.reshape(I * A, P, H) for x in (q.swapaxes(1, 2), k, v))
    return jax.lax.map(attend_head, heads).reshape(I, A, P, H).swapaxes(1, 2)
