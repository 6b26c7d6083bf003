"""Multiplication by int4 matrices in which each group of inputs has its own scales.

XLA supports int4 arrays, which take four bits per number in device memory. It avoids a dequantized
copy of the whole matrix only if the product is written in certain forms, which differ by platform.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float, Int

from ovis_jax.model.cpu import float32_product

_MAX_TILE_SIZE = 1 << 23
"""Maximum number of weights that are dequantized at a time on a CPU."""

_MIN_TPU_ROWS = 8
"""With fewer rows, XLA for TPUs computes the product elementwise and copies the matrix."""

_OUT_TILE = 64
"""Number of outputs that each program instance of the GPU kernel computes."""

_MIN_KERNEL_GROUP = 32
"""Smallest group size for the GPU kernel, which multiplies half a group at a time: Triton only
multiplies matrices with at least 16 columns."""


def multiply_by_int4(
    x: Float[Array, "rows i"], q: Int[Array, "G o g"], scale: Float[Array, "G o"]
) -> Float[Array, "rows o"]:
    """Multiply rows by the transpose of an int4 matrix; the result is float32.

    Args:
      x: Activations, bfloat16 or float32.
      q: The matrix in G groups of g consecutive inputs.
      scale: Scales of the groups.
    """
    _, O, g = q.shape  # noqa: E741
    on_gpu = _multiply_tiles
    # The compiler cannot shard a kernel, and the kernel's products are those of bfloat16.
    on_one_device = jax.typeof(q).sharding.mesh.size <= 1
    if x.dtype == jnp.bfloat16 and on_one_device and g >= _MIN_KERNEL_GROUP and O % _OUT_TILE == 0:
        on_gpu = multiply_in_kernel
    return jax.lax.platform_dependent(
        x, q, scale, tpu=_multiply_groups, cuda=on_gpu, default=_multiply_tiles
    )


def _multiply_groups(x: Array, q: Array, scale: Array) -> Array:
    """Multiply each group separately; XLA fuses the scales and the sum into the product."""
    rows, (G, _, g) = x.shape[0], q.shape
    if rows < _MIN_TPU_ROWS:
        x = jnp.pad(x, ((0, _MIN_TPU_ROWS - rows), (0, 0)))
    groups = x.reshape(x.shape[0], G, g)
    y = float32_product("rGg,Gog->Gro", groups, q.astype(x.dtype))
    return (y * scale[:, None]).sum(0)[:rows]


def _multiply_tiles(x: Array, q: Array, scale: Array) -> Array:
    """Dequantize one tile of outputs at a time; on a mesh, each device's part is one tile."""
    rows, (G, O, g) = x.shape[0], q.shape  # noqa: E741
    if rows == 1:
        x = jnp.broadcast_to(x, (2, G * g))  # a single bfloat16 row is slow on a CPU

    def multiply_tile(q: Array, scale: Array) -> Array:
        w = (q.astype(jnp.float32) * scale[..., None]).astype(x.dtype)
        return float32_product("ri,oi->ro", x, w.swapaxes(0, 1).reshape(-1, G * g))

    def multiply_tile_at(start: Array) -> Array:
        parts = (jax.lax.dynamic_slice_in_dim(y, start, O // tiles, axis=1) for y in (q, scale))
        return multiply_tile(*parts)

    tiles = 1
    if jax.typeof(q).sharding.mesh.size <= 1:
        tiles = next(n for n in range(1, O + 1) if O % n == 0 and O * G * g // n <= _MAX_TILE_SIZE)
    if tiles == 1:
        return multiply_tile(q, scale)[:rows]
    y = jax.lax.map(multiply_tile_at, jnp.arange(0, O, O // tiles, dtype=jnp.int32))
    return y.swapaxes(0, 1).reshape(-1, O)[:rows]  # [tiles, rows, o] -> [rows, O]


def multiply_in_kernel(x: Array, q: Array, scale: Array, interpret: bool = False) -> Array:
    """Multiply in a Triton kernel, which unpacks two numbers from each byte.

    Args:
      x: bfloat16 activations [rows, i].
      q: int4 [G, o, g]; o is a multiple of 64, g is at least 32.
      scale: Scales [G, o].
      interpret: Whether to run the kernel in Pallas's interpret mode, on any platform.
    """
    rows, (G, O, g) = x.shape[0], q.shape  # noqa: E741
    half = g // 2
    # An int4 array has the first of two numbers in the lower four bits, so this copies nothing.
    pairs = jax.lax.bitcast_convert_type(q.reshape(G, O, half, 2), jnp.int8)
    row_tile = 16 if rows <= 16 else 64
    padded = -(-rows // row_tile) * row_tile
    x = jnp.pad(x, ((0, padded - rows), (0, 0))).reshape(padded, G * half, 2)

    def kernel(even_ref: Any, odd_ref: Any, pairs_ref: Any, scale_ref: Any, out_ref: Any) -> None:
        def add_group(group: Any, total: Array) -> Array:
            columns = pl.ds(group * half, half)
            pair = pltriton.load(pairs_ref.at[group])
            low, high = (pair << 4) >> 4, pair >> 4  # arithmetic shifts keep the sign
            y = jnp.zeros_like(total)
            for x_ref, q in ((even_ref, low), (odd_ref, high)):
                part = pltriton.load(x_ref.at[:, columns])
                y += pltriton.dot(part, q.astype(part.dtype), trans_b=True)
            return total + y * pltriton.load(scale_ref.at[pl.ds(group, 1), :])

        zeros = jnp.zeros(out_ref.shape, jnp.float32)
        out_ref[...] = jax.lax.fori_loop(0, G, add_group, zeros)

    x_spec = pl.BlockSpec((row_tile, G * half), lambda r, o: (r, 0))
    y = pl.pallas_call(
        kernel,
        grid=(padded // row_tile, O // _OUT_TILE),
        in_specs=[
            x_spec,
            x_spec,
            pl.BlockSpec((G, _OUT_TILE, half), lambda r, o: (0, o, 0)),
            pl.BlockSpec((G, _OUT_TILE), lambda r, o: (0, o)),
        ],
        out_specs=pl.BlockSpec((row_tile, _OUT_TILE), lambda r, o: (r, o)),
        out_shape=jax.ShapeDtypeStruct((padded, O), jnp.float32),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="int4_matmul",
    )(x[..., 0], x[..., 1], pairs, scale)
    return y[:rows]
