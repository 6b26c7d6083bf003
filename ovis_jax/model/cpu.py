"""Workarounds for XLA's CPU backend.

Every function returns the same values as the simple form that runs on other platforms, except for
`multiply_by_int8`, which also rounds the activations. The times were measured with JAX 0.10.2 on
two cores with AVX-512 and AMX; only their ratios matter.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float, Int, Real

from ovis_jax.model.layers import matmul_precision


def multiply_by_weight(x: Array, w: Array, out_dtype: DTypeLike) -> Array:
    """Multiply x [..., in] by the transpose of w [out, in], in programs that run on a CPU.

    XLA is slow at some forms of bfloat16 matrix multiplication, which this function avoids:

    - A bfloat16 result takes 5 to 7 times as long as a float32 result: 58 ms compared with 9.5 ms
      for [1458, 1152] by [4304, 1152]. The function therefore computes a float32 result and casts
      it afterwards.
    - A single row takes 10 to 15 times as long as two rows: 20 ms compared with 1.4 ms for [1,
      2304] by [9216, 2304]. The function therefore computes a single row twice. (In float32, a
      single row is fast.)
    - With two leading axes, XLA transposes the weight, and a loop over tokens begins by copying all
      weights in transposed form. The function therefore merges the leading axes into one.

    The gradients equal those of autodiff, but are computed with products in the dtype of `x`.
    Autodiff multiplies bfloat16 arrays in float32, which is 4 to 7 times slower. In float32,
    autodiff sums over two axes of rows, so XLA first transposes the gradient of the result, which
    is 4 times slower.
    """
    # Inside `jax.shard_map`, the operands of a primitive must vary over the same mesh axes.
    x_axes, w_axes = (jax.typeof(y).manual_axis_type.varying for y in (x, w))
    x = jax.lax.pcast(x, tuple(w_axes - x_axes), to="varying")
    w = jax.lax.pcast(w, tuple(x_axes - w_axes), to="varying")
    return _multiply_by_weight.bind(x, w, out_dtype=out_dtype)


def _multiply(x: Array, w: Array, *, out_dtype: DTypeLike) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1 and x.dtype != jnp.float32:
        y = float32_product("ri,oi->ro", jnp.broadcast_to(rows, (2, rows.shape[1])), w)[:1]
    else:
        y = float32_product("ri,oi->ro", rows, w)
    return y.reshape(*x.shape[:-1], w.shape[0]).astype(out_dtype)


def _output_type(x: Any, w: Any, *, out_dtype: DTypeLike) -> Any:
    """Return the abstract value of the product, with the sharding that JAX derives for it."""
    return jax.lax.dot_general_p.abstract_eval(
        x,
        w,
        dimension_numbers=(((x.ndim - 1,), (1,)), ((), ())),
        precision=None,
        preferred_element_type=np.dtype(out_dtype),
        out_sharding=None,
    )[0]


def _gradient_of_x(dy: Array, x: Any, w: Array, *, out_dtype: DTypeLike) -> Array:
    dtype = x.aval.dtype
    return float32_product("...o,oi->...i", dy.astype(dtype), w).astype(dtype)


def _gradient_of_weight(dy: Array, x: Array, w: Any, *, out_dtype: DTypeLike) -> Array:
    dy, x_rows = dy.astype(x.dtype), x.reshape(-1, x.shape[-1])
    if x.dtype == jnp.float32:
        dw = float32_product("ro,ri->oi", dy.reshape(-1, dy.shape[-1]), x_rows)
    else:
        # The reshape after the transpose keeps XLA from folding the transpose into the product. XLA
        # supports the resulting form of product only in float32.
        dy_columns = jnp.moveaxis(dy, -1, 0).reshape(dy.shape[-1], -1)
        dw = float32_product("or,ri->oi", dy_columns, x_rows)
    return dw.astype(w.aval.dtype)


def _multiply_batch(
    arrays: tuple[Array, Array], axes: tuple[int | None, int | None], *, out_dtype: DTypeLike
) -> tuple[Array, int]:
    """Multiply under `jax.vmap`; usually, only the activations are batched."""
    x, w = arrays
    x_axis, w_axis = axes
    if x_axis is not None and w_axis is None:
        return multiply_by_weight(jnp.moveaxis(x, x_axis, 0), w, out_dtype), 0
    return jax.vmap(partial(_multiply, out_dtype=out_dtype), axes)(x, w), 0


# A primitive, because `jax.custom_vjp` would exclude forward-mode differentiation, and the rule of
# `jax.custom_jvp` cannot say how it is transposed.
_multiply_by_weight = Primitive("multiply_by_weight")
_multiply_by_weight.def_impl(jax.jit(_multiply, static_argnames="out_dtype"))
_multiply_by_weight.def_abstract_eval(_output_type)
mlir.register_lowering(_multiply_by_weight, mlir.lower_fun(_multiply, multiple_results=False))
ad.defbilinear(_multiply_by_weight, _gradient_of_x, _gradient_of_weight)
batching.primitive_batchers[_multiply_by_weight] = _multiply_batch


def float32_product(equation: str, x: Array, y: Array) -> Array:
    """Compute `jnp.einsum` of two arrays of the same dtype with a float32 result."""
    return jnp.einsum(
        equation, x, y, precision=matmul_precision(x), preferred_element_type=jnp.float32
    )


def multiply_by_int8(
    x: Float[Array, "*rows i"], q: Int[Array, "o i"], scale: Float[Array, "o"]
) -> Float[Array, "*rows o"]:
    """Multiply rows by an int8 matrix, in programs that run on a CPU; the result is float32.

    Compared with a product of two bfloat16 arrays, a product of bfloat16 and int8 takes 2 to 10
    times as long, but a product of two int8 arrays takes two thirds of the time. The function
    therefore rounds each row to int8, with one scale per row. A single row takes 11 times as long
    as two rows, so a single row is computed twice.
    """
    y = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    x_scale = jnp.max(jnp.abs(y), axis=1, keepdims=True) / 127
    # A row of zeros has the scale zero.
    x_q = jnp.round(y / jnp.where(x_scale == 0, 1.0, x_scale)).astype(jnp.int8)
    if len(y) == 1:
        x_q = jnp.broadcast_to(x_q, (2, x.shape[-1]))
    product = jnp.einsum("ri,oi->ro", x_q, q, preferred_element_type=jnp.int32)[: len(y)]
    product = product.astype(jnp.float32) * x_scale * scale[None]
    return product.reshape(*x.shape[:-1], len(q))


def lookup_rows(
    table: Float[Array, "V D"], tokens: Int[Array, "*shape"]
) -> Float[Array, "*shape D"]:
    """Return the rows `table[tokens]`; for use inside a loop over tokens.

    XLA converts bfloat16 rows to float32 when it reads them, and therefore converts the whole table
    before the loop. A barrier that makes the table look different in every step prevents this.
    """

    def lookup(table: Array, tokens: Array) -> Array:
        return table[tokens]

    def lookup_with_barrier(table: Array, tokens: Array) -> Array:
        return lookup(*jax.lax.optimization_barrier((table, tokens)))

    return jax.lax.platform_dependent(table, tokens, cpu=lookup_with_barrier, default=lookup)


def update_slice(
    array: Real[Array, "..."],
    update: Real[Array, "..."],
    start_indices: Sequence[Int[ArrayLike, ""]],
) -> Real[Array, "..."]:
    """Replace a slice of an array, as `jax.lax.dynamic_update_slice` does.

    On a CPU, XLA would convert a whole bfloat16 array to float32 to update it. The bits are
    therefore updated as integers, which takes the time of the slice alone if the array is donated.
    """

    def replace(array: Array, update: Array, *start_indices: Array) -> Array:
        return jax.lax.dynamic_update_slice(array, update, start_indices)

    def replace_bits(array: Array, update: Array, *start_indices: Array) -> Array:
        bits, new_bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (array, update))
        bits = replace(bits, new_bits, *start_indices)
        return jax.lax.bitcast_convert_type(bits, array.dtype)

    on_cpu = replace_bits if array.dtype == jnp.bfloat16 else replace
    indices = (jnp.asarray(x, jnp.int32) for x in start_indices)
    return jax.lax.platform_dependent(
        array, update.astype(array.dtype), *indices, cpu=on_cpu, default=replace
    )


def write_slot(
    row: Real[Array, "K S H"], value: Real[Array, "K 1 H"], slot: Int[Array, ""]
) -> Real[Array, "K S H"]:
    """Write the key or value of one position into a row of a cache.

    On a CPU, a bfloat16 row is written in a single pass that selects between the old and the new
    values. `update_slice` would copy a row per step if there are several rows.
    """

    def update(row: Array, value: Array, slot: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(row, value, slot, axis=1)

    def select(row: Array, value: Array, slot: Array) -> Array:
        is_written = jnp.arange(row.shape[1])[None, :, None] == slot  # [1, S, 1]
        return jnp.where(is_written, value, row)

    on_cpu = update if row.dtype == jnp.float32 else select
    return jax.lax.platform_dependent(row, value, slot, cpu=on_cpu, default=update)


def squeeze_single_row(cache: Any) -> Any:
    """Remove the batch axis of a `Cache` with one row, before a loop over tokens.

    XLA drops axes of size 1 in matrix products. If the loop carries the batch axis, XLA copies the
    cache four times per step to add and remove this axis. A cache with several rows is returned
    unchanged.
    """
    blocks = jax.tree.map(lambda x: x[0] if x.shape[0] == 1 else x, cache.blocks)
    return cache._replace(blocks=blocks)


def unsqueeze_single_row(cache: Any) -> Any:
    """Undo `squeeze_single_row`: add the batch axis, so that [K, S, H] becomes [1, K, S, H]."""
    is_single = cache.lengths.shape[0] == 1
    blocks = jax.tree.map(lambda x: x[None] if is_single else x, cache.blocks)
    return cache._replace(blocks=blocks)
