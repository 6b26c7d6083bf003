"""Attention in blocks of queries, in plain JAX: no array holds a score for every query and key.

Each block is plain attention of a few queries, so results differ from plain attention by rounding
at most. The gradient recomputes a block's scores instead of storing them.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ovis_jax.model.plain_attention import attend, visible

BLOCK_SIZE = 128
"""Largest number of queries in a block. Of 32 to 512, 128 was the fastest on a CPU."""

NUM_PARTS = 4
"""Parts of a prompt. Each part loops over its blocks and reads only the keys that it can see.

More parts skip more of the masked scores (37 % with 4, at most 50 %) and take longer to compile.
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
    """Causal attention of full prompts.

    Args:
      q: queries, after rotary embedding.
      k: keys of the same columns.
      v: values of the same columns.
      positions: positions that rise by one from column to column of each row; -1 at padding, on
        either side, where the result is finite and meaningless.
      window: number of positions that a query sees, including its own; None for no limit.
      scale: factor on the scores.
      cap: soft cap on the scaled scores; None for no cap.

    Returns:
      What `attend` returns for the mask of `visible`.
    """
    B, T, N, H = q.shape
    if T <= BLOCK_SIZE:
        return attend(q, k, v, visible(positions, positions, window), scale=scale, cap=cap)
    blocks = -(-T // BLOCK_SIZE)
    size = 8 * -(-T // (8 * blocks))  # equal blocks, with little padding after the last one
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
        # Two columns of a row are as far apart as their positions, so columns bound the window.
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
    """Attention of every patch to all patches of its crop, one head of one crop at a time."""
    I, P, A, H = q.shape  # noqa: E741
    if P <= BLOCK_SIZE:
        return attend(q, k, v, None, scale=scale)

    @partial(jax.checkpoint, prevent_cse=False)
    def attend_head(head: tuple[Array, Array, Array]) -> Array:
        q, k, v = head
        return attend(q[None, :, None], k[None, None], v[None, None], None, scale=scale)[0, :, 0]

    heads = tuple(x.reshape(I * A, P, H) for x in (q.swapaxes(1, 2), k, v))
    return jax.lax.map(attend_head, heads).reshape(I, A, P, H).swapaxes(1, 2)
