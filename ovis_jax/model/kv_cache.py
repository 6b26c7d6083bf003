"""The KV cache: keys and values of the positions read so far.

A global block caches every position. A local (sliding-window) block caches only the last
`sliding_window` positions, in a ring buffer. In both kinds of block, position p is stored in slot p
mod S. In a global block, S is the maximum length, so the slots are never overwritten.

In an int8 cache, the keys and values are `QuantizedKV` instead of arrays, and S is rounded up to a
multiple of `INT8_TILE`.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ovis_jax.config import DecoderConfig
from ovis_jax.model.cpu import update_slice, write_slot
from ovis_jax.model.plain_attention import run_kernel_per_device
from ovis_jax.model.quantized_kv import QuantizedKV

KVCacheDtype = Literal["auto", "int8"]
"""The dtype of a KV cache; "auto" is the dtype of the activations."""

INT8_TILE = 32
"""Number of consecutive slots that a TPU stores in one tile of int8 numbers."""

KeyValue = tuple[Float[Array, "B K S H"] | QuantizedKV, Float[Array, "B K S H"] | QuantizedKV]
"""The keys and the values of one block."""

CacheBlock = tuple[
    Float[Array, "rows K S H"] | QuantizedKV, Float[Array, "rows K S H"] | QuantizedKV
]
"""The keys and the values of one block, for rows that may be others than those of the batch."""

NewKeyValue = tuple[Float[Array, "B K T H"] | QuantizedKV, Float[Array, "B K T H"] | QuantizedKV]
"""The keys and the values of T new positions in one block."""


class Cache(NamedTuple):
    """The KV cache of all blocks.

    Attributes:
      blocks: Keys and values of each block.
      lengths: Number of positions that each row has read.
    """

    blocks: tuple[CacheBlock, ...]
    lengths: Int[Array, "B"]


def num_slots(
    config: DecoderConfig, block: int, max_length: int, kv_cache_dtype: KVCacheDtype = "auto"
) -> int:
    """Return S, the number of slots of a block in a cache for up to `max_length` positions."""
    window = config.window(block)
    slots = max_length if window is None else min(window, max_length)
    return slots if kv_cache_dtype == "auto" else -(-slots // INT8_TILE) * INT8_TILE


def empty_cache(
    config: DecoderConfig,
    num_rows: int,
    max_length: int,
    dtype: DTypeLike,
    kv_cache_dtype: KVCacheDtype = "auto",
) -> Cache:
    """Create a cache whose rows are all empty; `dtype` is the dtype of the activations."""

    def zeros(block: int) -> Array | QuantizedKV:
        slots = num_slots(config, block, max_length, kv_cache_dtype)
        shape = (num_rows, config.num_kv_heads, slots, config.head_dim)
        if kv_cache_dtype == "auto":
            return jnp.zeros(shape, dtype)
        return QuantizedKV(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:3], jnp.float32))

    blocks = tuple((zeros(i), zeros(i)) for i in range(config.depth))
    return Cache(blocks, jnp.zeros((num_rows,), jnp.int32))


def slot_positions(lengths: Int[Array, "B"], num_slots: int) -> Int[Array, "B S"]:
    """Return the position stored in each slot after `lengths` positions; -1 for an empty slot."""
    last = lengths[:, None] - 1  # [B, 1]
    positions = last - (last - jnp.arange(num_slots, dtype=jnp.int32)[None]) % num_slots
    return jnp.maximum(positions, -1)


def cache_prompt(
    key_value: NewKeyValue,
    positions: Int[Array, "B T"],
    num_slots: int,
) -> KeyValue:
    """Build a block's cache from the keys and values of full prompts.

    Args:
      key_value: Keys and values of the prompts.
      positions: Positions, from 0; -1 at padding, which may be on either side.
      num_slots: The number of slots of the block, S.
    """
    lengths = jnp.max(positions, axis=1) + 1
    first = jnp.argmax(positions >= 0, axis=1)  # the column of position 0
    columns = first[:, None] + jnp.maximum(slot_positions(lengths, num_slots), 0)  # [B, S]
    return jax.tree.map(partial(_take_columns, columns=columns), key_value)


def delay_reading(block: CacheBlock, key_value: NewKeyValue) -> tuple[CacheBlock, NewKeyValue]:
    """Return both arguments; on a GPU, the block is read only after `key_value` is computed.

    Otherwise, XLA takes the rows of all blocks first and keeps them all.
    """
    return _barrier_on_gpu((block, key_value))


def take_rows(block: CacheBlock, rows: Int[Array, "B"]) -> KeyValue:
    """Return B rows of a block's cache."""

    def take(x: Array) -> Array:
        # In slices, because a gather of rows is slower.
        slices = [jax.lax.dynamic_slice_in_dim(x, row, 1, axis=0) for row in rows]
        return jnp.concatenate(slices) if len(slices) > 1 else slices[0]

    return _barrier_on_gpu(jax.tree.map(take, block))


def append_chunk(
    block: KeyValue,
    key_value: NewKeyValue,
    positions: Int[Array, "B T"],
) -> KeyValue:
    """Write T positions per row into a block's cache; in a ring buffer, these replace the oldest.

    Args:
      block: The cache of the block.
      key_value: Keys and values of the new positions.
      positions: Consecutive positions that continue each row; -1 at padding on the right.
    """
    S, T = length(block), positions.shape[1]
    size = min(S, T)
    first = positions[:, :1]
    num_new = jnp.max(positions, axis=1) + 1 - first[:, 0]
    stored = slot_positions(first[:, 0] + num_new, S)  # [B, S]
    start = jnp.clip(num_new - S, 0, T - size)  # the first of the columns that fit

    def write(old: Array, values: Array) -> Array:
        # The columns are moved to their slots in slices, because a gather of S slots is slower.
        moved = []
        for i in range(len(old)):
            row = jax.lax.dynamic_slice_in_dim(values[i : i + 1], start[i], size, axis=2)
            padding = [(0, 0), (0, 0), (0, S - size), *[(0, 0)] * (row.ndim - 3)]
            moved.append(jnp.roll(jnp.pad(row, padding), (first[i, 0] + start[i]) % S, axis=2))
        is_new = jnp.expand_dims(stored >= first, (1, *range(3, old.ndim)))
        return jnp.where(is_new, jnp.concatenate(moved), old)

    return jax.tree.map(write, block, key_value)


def put_chunk(
    block: CacheBlock,
    new_rows: KeyValue,
    positions: Int[Array, "B T"],
    rows: Int[Array, "B"],
) -> CacheBlock:
    """Copy the slots that `append_chunk` has changed into rows of a block's cache.

    Only these slots, and those that share a tile with them, are written.

    Args:
      block: The cache of the block.
      new_rows: The rows after `append_chunk`.
      positions: The positions that `append_chunk` has written.
      rows: The rows of the cache.
    """
    S, T = length(block), positions.shape[1]
    tile = INT8_TILE if S % INT8_TILE == 0 else 1
    size = min(S, -(-(T + tile - 1) // tile) * tile)  # slots in the tiles from any start on

    def put(cache: Array, new: Array) -> Array:
        for i, row in enumerate(rows):
            first = jnp.minimum(positions[i, 0] % S // tile * tile, S - size)
            # Positions that do not fit before the end of a ring buffer are at its start.
            for begin in (first, jnp.int32(0)):
                changed = jax.lax.dynamic_slice_in_dim(new[i : i + 1], begin, size, axis=2)
                cache = update_slice(cache, changed, (row, 0, begin, *[0] * (cache.ndim - 3)))
        return cache

    return jax.tree.map(put, block, new_rows)


def append_token(block: KeyValue, key_value: NewKeyValue, positions: Int[Array, "B 1"]) -> KeyValue:
    """Write one position per row into a block's cache; in a ring buffer, this replaces the oldest.

    Args:
      block: The cache of the block.
      key_value: Key and value of the new position in each row; T is 1.
      positions: The new positions.
    """
    slots = positions[:, 0] % length(block)

    def write(rows: Array, values: Array) -> Array:
        if rows.ndim == 3:  # scales
            is_written = jnp.arange(rows.shape[2])[None, None] == slots[:, None, None]
            return jnp.where(is_written, values, rows)
        if len(rows) == 1:  # without a batch axis, every backend updates in place
            return write_slot(rows[0], values[0], slots[0])[None]
        return jax.vmap(write_slot)(rows, values, slots)

    def write_int8_on_tpu(rows: Array, values: Array) -> Array:
        if rows.dtype != jnp.int8:
            return write(rows, values)
        return run_kernel_per_device(_write_tiles, rows, values, slots)

    if not isinstance(block[0], QuantizedKV):
        return jax.tree.map(write, block, key_value)
    return jax.lax.platform_dependent(
        block,
        key_value,
        tpu=partial(jax.tree.map, write_int8_on_tpu),
        default=partial(jax.tree.map, write),
    )


def _write_tiles(
    rows: Int[Array, "B K S H"], values: Int[Array, "B K 1 H"], slots: Int[Array, "B"]
) -> Int[Array, "B K S H"]:
    """Write one slot per row of an int8 cache, in programs that run on a TPU.

    A TPU stores int8 numbers in tiles of 32 slots. To update a single slot, or several rows at
    once, XLA copies the whole cache into a layout with smaller tiles and back. This function
    instead reads, changes and writes a tile of each row in a loop over the rows.
    """
    B, K, S, H = rows.shape

    def write_row(row: Array, tiles: Array) -> Array:
        tile, offset = jnp.divmod(slots[row], INT8_TILE)
        index = tuple(jnp.int32(x) for x in (row, 0, tile, 0, 0))
        value = values[row][None, :, None]
        old = jax.lax.dynamic_slice(tiles, index, (1, K, 1, INT8_TILE, H))
        is_written = jnp.arange(INT8_TILE)[None, None, None, :, None] == offset
        return jax.lax.dynamic_update_slice(tiles, jnp.where(is_written, value, old), index)

    tiles = rows.reshape(B, K, S // INT8_TILE, INT8_TILE, H)
    return jax.lax.fori_loop(0, B, write_row, tiles, unroll=8).reshape(rows.shape)


def resize_rows(
    block: CacheBlock, num_slots: int
) -> tuple[Float[Array, "rows K T H"] | QuantizedKV, Float[Array, "rows K T H"] | QuantizedKV]:
    """Change the number of slots per row of a block's cache from S to T = `num_slots`.

    New slots are empty. Positions in slots that are removed are lost, and the positions in the
    other slots must not have wrapped around.
    """

    def resize(x: Array) -> Array:
        added = max(num_slots - x.shape[2], 0)
        padding = [(0, 0), (0, 0), (0, added), *[(0, 0)] * (x.ndim - 3)]
        return jnp.pad(x, padding)[:, :, :num_slots]

    return jax.tree.map(resize, block)


def length(block: KeyValue) -> int:
    """Return S, the number of slots of a block's cache."""
    return jax.tree.leaves(block)[0].shape[2]


def as_arrays(
    block: KeyValue, dtype: DTypeLike
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Return keys and values as arrays; quantized ones are dequantized to `dtype`."""
    k, v = (x.dequantized(dtype) if isinstance(x, QuantizedKV) else x for x in block)
    return k, v


def _barrier_on_gpu(arrays: Any) -> Any:
    """Return the arrays; on a GPU, XLA optimizes their computation and their use separately.

    Without this, XLA reads rows directly from the cache in each operation that uses them, and
    copies the whole cache, because some of these operations run after the cache is updated.
    """

    def keep(arrays: Any) -> Any:
        return arrays

    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(arrays, cuda=barrier, rocm=barrier, default=keep)


def _take_columns(x: Array, columns: Int[Array, "B S"]) -> Array:
    """Gather keys, values or scales [B, K, T, ...] at one index of axis T per slot."""
    columns = jnp.expand_dims(columns, (1, *range(3, x.ndim)))  # [B, 1, S] or [B, 1, S, 1]
    return jnp.take_along_axis(x, columns, axis=2)
