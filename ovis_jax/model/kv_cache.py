"""The KV cache: keys and values of the positions read so far.

A global block caches every position. A local (sliding-window) block caches only the last
`sliding_window` positions, in a ring buffer. In both, position p is stored in slot p mod S. In a
global block, S is the maximum length, so the slots are never overwritten.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ovis_jax.config import DecoderConfig
from ovis_jax.model.cpu import write_slot

KeyValue = tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]
"""The keys and the values of one block."""


class Cache(NamedTuple):
    """The KV cache of all blocks.

    Attributes:
      blocks: Keys and values of each block.
      lengths: Number of positions that each row has read.
    """

    blocks: tuple[KeyValue, ...]
    lengths: Int[Array, "B"]


def num_slots(config: DecoderConfig, block: int, max_length: int) -> int:
    """Return S, the number of slots of a block in a cache for up to `max_length` positions."""
    window = config.window(block)
    return max_length if window is None else min(window, max_length)


def empty_cache(config: DecoderConfig, num_rows: int, max_length: int, dtype: DTypeLike) -> Cache:
    """Create a cache whose rows are all empty."""

    def zeros(block: int) -> Array:
        slots = num_slots(config, block, max_length)
        return jnp.zeros((num_rows, config.num_kv_heads, slots, config.head_dim), dtype)

    blocks = tuple((zeros(i), zeros(i)) for i in range(config.depth))
    return Cache(blocks, jnp.zeros((num_rows,), jnp.int32))


def slot_positions(lengths: Int[Array, "B"], num_slots: int) -> Int[Array, "B S"]:
    """Return the position stored in each slot after `lengths` positions; -1 for an empty slot."""
    last = lengths[:, None] - 1  # [B, 1]
    positions = last - (last - jnp.arange(num_slots, dtype=jnp.int32)[None]) % num_slots
    return jnp.maximum(positions, -1)


def cache_prompt(
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    positions: Int[Array, "B T"],
    num_slots: int,
) -> KeyValue:
    """Build a block's cache from the keys and values of full prompts.

    Args:
      k: Keys of the prompts.
      v: Values of the prompts.
      positions: Positions, from 0; -1 at padding, which may be on either side.
      num_slots: The number of slots of the block, S.
    """
    lengths = jnp.max(positions, axis=1) + 1
    first = jnp.argmax(positions >= 0, axis=1)  # the column of position 0
    columns = first[:, None] + jnp.maximum(slot_positions(lengths, num_slots), 0)  # [B, S]
    columns = columns[:, None, :, None]
    return jnp.take_along_axis(k, columns, axis=2), jnp.take_along_axis(v, columns, axis=2)


def append_chunk(
    block: KeyValue,
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    positions: Int[Array, "B T"],
) -> KeyValue:
    """Write T positions per row into a block's cache; in a ring buffer they replace the oldest.

    Args:
      block: The cache of the block.
      k: Keys of the new positions.
      v: Values of the new positions.
      positions: Consecutive positions that continue each row; -1 at padding on the right.
    """
    slots, T = block[0].shape[2], k.shape[2]
    first = positions[:, :1]
    stored = slot_positions(jnp.max(positions, axis=1) + 1, slots)  # [B, S]
    columns = jnp.clip(stored - first, 0, T - 1)[:, None, :, None]
    is_new = (stored >= first)[:, None, :, None]

    def update(old: Array, values: Array) -> Array:
        return jnp.where(is_new, jnp.take_along_axis(values, columns, axis=2), old)

    return update(block[0], k), update(block[1], v)


def append_token(
    block: KeyValue,
    k: Float[Array, "B K 1 H"],
    v: Float[Array, "B K 1 H"],
    positions: Int[Array, "B"],
) -> KeyValue:
    """Write one position per row into a block's cache; in a ring buffer it replaces the oldest."""
    slots = positions % block[0].shape[2]

    def update(rows: Array, values: Array) -> Array:
        if rows.shape[0] == 1:  # without a batch axis, every backend updates in place
            return write_slot(rows[0], values[0], slots[0])[None]
        return jax.vmap(write_slot)(rows, values, slots)

    return update(block[0], k), update(block[1], v)
