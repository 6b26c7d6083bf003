"""Weight matrices, and the functions that multiply by them or look up their rows.

A weight is a matrix [out, in], in the same orientation as in the checkpoint, or one of the types
defined here. `linear` supports all types of weights, so modules need no change for a new type.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ovis_jax.model import cpu, int4_matmul
from ovis_jax.model.layers import matmul_precision, over_last_axis

init_weight = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
"""Initializer for matrices [out, in]."""


if TYPE_CHECKING:
    _AnyArray = Array
else:  # `ovis_jax.plan` and `jax.stages.Lowered` describe matrices without their values
    _AnyArray = Array | jax.ShapeDtypeStruct | jax.stages.ArgInfo


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A matrix of small integers with float32 scales, which stays quantized in `linear`.

    Attributes:
      q: int8 [o, i], or int4 [G, o, g] in G groups of g consecutive inputs.
      scale: float32, one scale per row [o] for int8, or one per group and row [G, o] for int4.
    """

    q: Int[_AnyArray, "o i"] | Int[_AnyArray, "G o g"]
    scale: Float[_AnyArray, "o"] | Float[_AnyArray, "G o"]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape [o, i] of the matrix."""
        rows = self.q.shape[-2]
        return rows, self.q.size // rows

    def dequantized(self, dtype: DTypeLike) -> Float[Array, "o i"]:
        """Return the matrix as an array, computed in float32 and rounded to `dtype`."""
        w = (self.q.astype(jnp.float32) * self.scale[..., None]).astype(dtype)
        return w if w.ndim == 2 else w.swapaxes(0, 1).reshape(self.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A matrix with a LoRA adapter (Hu et al. 2021), equivalent to the matrix w + b a."""

    w: Float[Array, "o i"] | Quantized
    a: Float[Array, "R i"]
    b: Float[Array, "o R"]

    def merged(self) -> Float[Array, "o i"]:
        """Return the matrix w + b a, computed in float32 and rounded to the dtype of `w`.

        For a quantized `w`, the result has the dtype of the adapter.
        """
        product = jnp.matmul(
            self.b.astype(jnp.float32), self.a.astype(jnp.float32), precision="highest"
        )
        if isinstance(self.w, Quantized):
            return (self.w.dequantized(jnp.float32) + product).astype(self.a.dtype)
        return (self.w.astype(jnp.float32) + product).astype(self.w.dtype)


Weight = Array | Quantized | LowRank
"""A matrix that `linear` multiplies by."""


def weight_param(module: nn.Module, name: str, shape: tuple[int, int], dtype: DTypeLike) -> Weight:
    """Return a module's weight, or create it in `init`.

    Unlike `nn.Module.param`, this accepts a weight whose arrays do not have the matrix's shape.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init_weight, shape, dtype)


def linear(
    x: Float[Array, "*rows i"],
    w: Float[Array, "o i"] | Quantized | LowRank,
    bias: Float[Array, "o"] | None = None,
    *,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "*rows o"]:
    """Compute x w^T + bias, with accumulation in float32.

    On a CPU, a product with an int8 matrix rounds the activations to int8, too, with one scale per
    row (Dettmers et al. 2022). Other platforms round only the matrix.

    A quantized matrix is treated as a constant, so the derivative with respect to the matrix is
    zero. The derivative with respect to `x` is that of the product with the dequantized matrix.

    Args:
      x: Activations.
      w: The weight.
      bias: The bias, which is added in `out_dtype`; None for no bias.
      out_dtype: Dtype of the result; None for the dtype of `x`.
    """
    out_dtype = out_dtype or x.dtype
    if isinstance(w, LowRank):
        y = linear(x, w.w, bias, out_dtype=out_dtype)
        return y + linear(linear(x, w.a), w.b, out_dtype=out_dtype)
    if isinstance(w, Quantized):
        y = _quantized_matmul(x, w.q, w.scale, np.dtype(out_dtype))
    else:
        y = _matmul(x, w, np.dtype(out_dtype))
    return y if bias is None else y + over_last_axis(bias.astype(out_dtype), y)


# `jit` traces each shape once instead of once per block; `inline` removes the call from the
# program.
@partial(jax.jit, static_argnums=2, inline=True)
def _matmul(x: Array, w: Array, out_dtype: DTypeLike) -> Array:
    def matmul(x: Array, w: Array) -> Array:
        return jnp.einsum(
            "...i,oi->...o",
            x,
            w,
            precision=matmul_precision(x),
            preferred_element_type=out_dtype,
        ).astype(out_dtype)

    cpu_product = partial(cpu.multiply_by_weight, out_dtype=out_dtype)
    return jax.lax.platform_dependent(x, w, cpu=cpu_product, default=matmul)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _multiply_quantized(x: Array, q: Array, scale: Array, out_dtype: DTypeLike) -> Array:
    if q.ndim == 3:
        y = int4_matmul.multiply_by_int4(x.reshape(-1, x.shape[-1]), q, scale)
        y = y.reshape(*x.shape[:-1], q.shape[1])
    else:
        y = jax.lax.platform_dependent(
            x, q, scale, cpu=cpu.multiply_by_int8, default=_multiply_by_int8
        )
    return y.astype(out_dtype)


@_multiply_quantized.defjvp
def _derivative_of_x(out_dtype: DTypeLike, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, q, scale = primals
    dy = _matmul(tangents[0], Quantized(q, scale).dequantized(x.dtype), out_dtype)
    return _multiply_quantized(x, q, scale, out_dtype), dy


_quantized_matmul = jax.jit(_multiply_quantized, static_argnums=3, inline=True)


def _multiply_by_int8(x: Array, q: Array, scale: Array) -> Array:
    # The compilers for TPUs and GPUs convert the integers inside of the product, without a copy.
    # The axes of `x` stay apart, because a TPU would copy the 729 rows of each crop to join them.
    y = cpu.float32_product("...i,oi->...o", x, q.astype(x.dtype))
    return y * over_last_axis(scale, y)


def lookup(
    table: Float[Array, "n D"] | Quantized,
    rows: Int[Array, "*shape"],
    dtype: DTypeLike,
    *,
    in_loop: bool = False,
) -> Float[Array, "*shape D"]:
    """Return rows of a table.

    Args:
      table: The table; int8 if it is quantized.
      rows: Indices of the rows.
      dtype: Dtype of the rows from a quantized table; other tables keep their dtype.
      in_loop: Whether the call is in the body of a loop, where XLA's CPU backend needs a
        workaround.
    """
    if not isinstance(table, Quantized):
        return cpu.lookup_rows(table, rows) if in_loop else table[rows]
    flat = rows.reshape(-1)
    if flat.size == 1:
        # On a TPU, XLA copies the whole table into another layout to read a single row.
        flat = jnp.broadcast_to(flat, (2,))
    q, scale = (x.at[flat].get(mode="clip") for x in (table.q, table.scale))
    found = (q.astype(jnp.float32) * scale[:, None]).astype(dtype)
    return found[: rows.size].reshape(*rows.shape, -1)
