"""Keys and values of the positions read so far.

A global block keeps every position; a local block keeps a ring of the last `sliding_window`. Both
follow one rule: position p lies in slot p mod S. A full cache is a ring that never comes round.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ovis_jax.config import DecoderConfig

KeyValue = tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]
"""Keys and values of one block."""


class Cache(NamedTuple):
    """The cache of all blocks, and how many positions each row has read."""

    blocks: tuple[KeyValue, ...]
    lengths: Int[Array, "B"]


def num_slots(config: DecoderConfig, block: int, max_length: int) -> int:
    """S: the slots that a block needs for rows of up to `max_length` positions."""
    window = config.window(block)
    return max_length if window is None else min(window, max_length)


def empty(config: DecoderConfig, rows: int, max_length: int, dtype: DTypeLike) -> Cache:
    """The cache of rows that have read nothing."""

    def zeros(block: int) -> Array:
        slots = num_slots(config, block, max_length)
        return jnp.zeros((rows, config.num_kv_heads, slots, config.head_dim), dtype)

    blocks = tuple((zeros(i), zeros(i)) for i in range(config.depth))
    return Cache(blocks, jnp.zeros((rows,), jnp.int32))


def slot_positions(lengths: Int[Array, "B"], slots: int) -> Int[Array, "B S"]:
    """The position that each slot holds once `lengths` positions were written; -1 where none."""
    last = lengths[:, None] - 1  # [B, 1]
    positions = last - (last - jnp.arange(slots)) % slots
    return jnp.maximum(positions, -1)


def fill(
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    positions: Int[Array, "B T"],
    slots: int,
) -> KeyValue:
    """The slots of a block after a whole prompt; `positions` is -1 at padding on either side."""
    lengths = jnp.max(positions, axis=1) + 1
    first = jnp.argmax(positions >= 0, axis=1)  # the column of position 0
    columns = first[:, None] + jnp.maximum(slot_positions(lengths, slots), 0)  # [B, S]
    columns = columns[:, None, :, None]
    return jnp.take_along_axis(k, columns, axis=2), jnp.take_along_axis(v, columns, axis=2)


def append(
    block: KeyValue,
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    positions: Int[Array, "B T"],
) -> KeyValue:
    """Put T more positions a row in their slots, over those that leave.

    `positions` goes on where the row has come to, rising by one; -1 at padding on the right.
    """
    slots, T = block[0].shape[2], k.shape[2]
    first = positions[:, :1]
    held = slot_positions(jnp.max(positions, axis=1) + 1, slots)  # [B, S]
    columns = jnp.clip(held - first, 0, T - 1)[:, None, :, None]
    new = (held >= first)[:, None, :, None]

    def put(old: Array, values: Array) -> Array:
        return jnp.where(new, jnp.take_along_axis(values, columns, axis=2), old)

    return put(block[0], k), put(block[1], v)


def write(
    block: KeyValue,
    k: Float[Array, "B K 1 H"],
    v: Float[Array, "B K 1 H"],
    positions: Int[Array, "B"],
) -> KeyValue:
    """Put one more position a row in its slot, over the position that leaves."""
    slots = positions % block[0].shape[2]

    def put(rows: Array, values: Array) -> Array:
        if rows.shape[0] == 1:  # without an axis of rows, every backend does it in place
            return _put(rows[0], values[0], slots[0])[None]
        return jax.vmap(_put)(rows, values, slots)

    return put(block[0], k), put(block[1], v)


def _put(row: Float[Array, "K S H"], value: Float[Array, "K 1 H"], slot: Array) -> Array:
    def update(row: Array, value: Array, slot: Array) -> Array:
        return jax.lax.dynamic_update_slice(row, value, (0, slot, 0))

    def choose(row: Array, value: Array, slot: Array) -> Array:
        here = jnp.arange(row.shape[1]) == slot  # [S]
        return jnp.where(here[:, None], value, row)

    # XLA's CPU backend updates bfloat16 in a float32 copy of the whole; to choose is one pass.
    cpu = update if row.dtype == jnp.float32 else choose
    return jax.lax.platform_dependent(row, value, slot, cpu=cpu, default=update)
