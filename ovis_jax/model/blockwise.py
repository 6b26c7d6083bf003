"""Softmax attention in pieces, in plain JAX: no array has a score for every query and key.

Each piece is the plain attention of a few queries, so that results differ by rounding at most. A
piece's gradient computes its scores again instead of keeping them.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ovis_jax.model.attention import attend, visible

BLOCK = 128
"""Queries of a piece; what is not longer is left whole. Measured best of 32 to 512 on a CPU."""

PARTS = 4
"""Parts of a prompt, each with a loop over its blocks that reads only the keys the part can see.

More parts skip more of what is hidden, 37 % with 4 of at most 50 %, and take longer to compile.
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
    """Attention of whole prompts over themselves.

    Args:
      q: queries, turned by their positions.
      k: keys of the same columns.
      v: values of the same columns.
      positions: rising by one from column to column of each row; -1 at padding on either side,
        where the result is finite and means nothing.
      window: positions that a query sees, itself included; None for all before it.
      scale: factor on the scores.
      cap: soft cap on the scaled scores.

    Returns:
      What `attend` gives with the mask of `visible`.
    """
    B, T, N, H = q.shape
    if T <= BLOCK:
        return attend(q, k, v, visible(positions, positions, window), scale=scale, cap=cap)
    blocks = -(-T // BLOCK)
    size = 8 * -(-T // (8 * blocks))  # all of one size, with little padding behind the last
    padding = blocks * size - T
    queries = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    queries = queries.reshape(B, blocks, size, N, H).swapaxes(0, 1)
    rows = jnp.pad(positions, ((0, 0), (0, padding)), constant_values=-1)
    rows = rows.reshape(B, blocks, size).swapaxes(0, 1)

    @partial(jax.checkpoint, prevent_cse=False)
    def block(q: Array, rows: Array, k: Array, v: Array, columns: Array) -> Array:
        return attend(q, k, v, visible(rows, columns, window), scale=scale, cap=cap)

    out = []
    step = -(-blocks // PARTS)
    for first in range(0, blocks, step):
        part = slice(first, first + step)
        # Real columns of a row lie as far apart as their positions.
        low = 0 if window is None else max(0, first * size - window + 1)
        seen = slice(low, min((first + step) * size, T))
        keys, values, columns = k[:, :, seen], v[:, :, seen], positions[:, seen]

        def one(piece: tuple[Array, Array], sight: tuple = (keys, values, columns)) -> Array:
            return block(*piece, *sight)

        out.append(jax.lax.map(one, (queries[part], rows[part])))  # [blocks, B, size, N, H]
    return jnp.concatenate(out).swapaxes(0, 1).reshape(B, blocks * size, N, H)[:, :T]


def attend_crops(
    q: Float[Array, "I P A H"],
    k: Float[Array, "I A P H"],
    v: Float[Array, "I A P H"],
    *,
    scale: float,
) -> Float[Array, "I P A H"]:
    """Attention of every patch of a crop over all of them, one head of one crop at a time."""
    I, P, A, H = q.shape  # noqa: E741
    if P <= BLOCK:
        return attend(q, k, v, None, scale=scale)

    @partial(jax.checkpoint, prevent_cse=False)
    def head(piece: tuple[Array, Array, Array]) -> Array:
        q, k, v = piece
        return attend(q[None, :, None], k[None, None], v[None, None], None, scale=scale)[0, :, 0]

    out = jax.lax.map(head, tuple(x.reshape(I * A, P, H) for x in (q.swapaxes(1, 2), k, v)))
    return out.reshape(I, A, P, H).swapaxes(1, 2)
