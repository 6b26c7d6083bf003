"""Workarounds for XLA's CPU backend, and nothing else.

Every function returns the same values as its plain form, which other platforms run. The times are
from two cores with AVX-512 and AMX under JAX 0.10.2; only their ratios matter.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ovis_jax.model.layers import matmul_precision


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply_by_weight(x: Array, w: Array, out_dtype: DTypeLike) -> Array:
    """The product x [..., in] times w [out, in] transposed, for programs that run on a CPU.

    XLA is slow at bfloat16 products of certain forms, which this function avoids:

    - A bfloat16 result takes 5 to 7 times as long as a float32 one: 58 ms against 9.5 ms for
      [1458, 1152] by [4304, 1152]. The result is always float32 here and is cast afterwards.
    - A single row takes 10 to 15 times as long as two: 20 ms against 1.4 ms for [1, 2304] by
      [9216, 2304]. A single row is computed twice. (In float32 a single row is the fast case.)
    - With two leading axes XLA transposes the weight, and a loop over tokens starts with a
      transposed copy of all weights. The leading axes become one.
    """
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1 and x.dtype != jnp.float32:
        y = _float32_product("ri,oi->ro", jnp.broadcast_to(rows, (2, rows.shape[1])), w)[:1]
    else:
        y = _float32_product("ri,oi->ro", rows, w)
    return y.reshape(*x.shape[:-1], w.shape[0]).astype(out_dtype)


def _matmul_forward(x: Array, w: Array, out_dtype: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
    return multiply_by_weight(x, w, out_dtype), (x, w)


def _matmul_backward(
    out_dtype: DTypeLike, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    """The gradients of autodiff, with products in the dtype of `x` over one axis of rows.

    Autodiff multiplies bfloat16 in float32, which is 4 to 7 times slower. In float32 it sums over
    two axes, for which XLA transposes `dy` first, which is 4 times slower.
    """
    x, w = saved
    dy, x_rows = dy.astype(x.dtype), x.reshape(-1, x.shape[-1])
    if x.dtype == jnp.float32:
        dw = _float32_product("ro,ri->oi", dy.reshape(-1, dy.shape[-1]), x_rows)
    else:
        # The reshape after the transpose keeps XLA from folding the transpose into the product,
        # whose form would then be one that XLA has only in float32.
        dy_columns = jnp.moveaxis(dy, -1, 0).reshape(w.shape[0], -1)
        dw = _float32_product("or,ri->oi", dy_columns, x_rows)
    dx = _float32_product("...o,oi->...i", dy, w)
    return dx.astype(x.dtype), dw.astype(w.dtype)


multiply_by_weight.defvjp(_matmul_forward, _matmul_backward)


def _float32_product(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(
        equation, x, y, precision=matmul_precision(x), preferred_element_type=jnp.float32
    )


def lookup_rows(table: Float[Array, "V D"], tokens: Int[Array, "B"]) -> Float[Array, "B D"]:
    """The rows `table[tokens]`, inside a loop over tokens.

    XLA reads bfloat16 rows through float32 and widens the whole table before the loop, unless a
    barrier makes the table look different in every step.
    """

    def lookup(table: Array, tokens: Array) -> Array:
        return table[tokens]

    def lookup_with_barrier(table: Array, tokens: Array) -> Array:
        return lookup(*jax.lax.optimization_barrier((table, tokens)))

    return jax.lax.platform_dependent(table, tokens, cpu=lookup_with_barrier, default=lookup)


def write_slot(
    row: Float[Array, "K S H"], value: Float[Array, "K 1 H"], slot: Int[Array, ""]
) -> Float[Array, "K S H"]:
    """Write one position into a row of a cache.

    On the CPU, XLA would update a bfloat16 row through a float32 copy of the whole row. This
    function selects between the old and the new value instead, which takes a single pass.
    """

    def update(row: Array, value: Array, slot: Array) -> Array:
        return jax.lax.dynamic_update_slice(row, value, (0, slot, 0))

    def select(row: Array, value: Array, slot: Array) -> Array:
        is_written = jnp.arange(row.shape[1]) == slot  # [S]
        return jnp.where(is_written[:, None], value, row)

    on_cpu = update if row.dtype == jnp.float32 else select
    return jax.lax.platform_dependent(row, value, slot, cpu=on_cpu, default=update)


def squeeze_single_row(cache: Any) -> Any:
    """Drop the batch axis of a `Cache` of one row, for a loop over tokens to carry.

    XLA drops an axis of size 1 in products. If the loop carries the axis, XLA copies the cache
    between the two shapes, four times per step. A cache of several rows stays as it is.
    """
    blocks = jax.tree.map(lambda x: x[0] if x.shape[0] == 1 else x, cache.blocks)
    return cache._replace(blocks=blocks)


def unsqueeze_single_row(cache: Any) -> Any:
    """Undo `squeeze_single_row`: [K, S, H] becomes [1, K, S, H]."""
    blocks = jax.tree.map(lambda x: x[None] if x.ndim == 3 else x, cache.blocks)
    return cache._replace(blocks=blocks)
