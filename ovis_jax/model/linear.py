"""Weight matrices, and the function that multiplies by them.

A weight is a matrix [out, in], in the same orientation as in the checkpoint, or one of the types
defined here. `linear` supports all types of weights, so modules do not need to change for a new
type.
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from ovis_jax.model import cpu
from ovis_jax.model.layers import matmul_precision, over_last_axis

init_weight = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
"""Initializer for matrices [out, in]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A matrix with a LoRA adapter (Hu et al. 2021), equivalent to the matrix w + b a."""

    w: Float[Array, "o i"]
    a: Float[Array, "R i"]
    b: Float[Array, "o R"]

    def merged(self) -> Float[Array, "o i"]:
        """Return the matrix w + b a, computed in float32 and rounded to the dtype of `w`."""
        product = jnp.matmul(
            self.b.astype(jnp.float32), self.a.astype(jnp.float32), precision="highest"
        )
        return (self.w.astype(jnp.float32) + product).astype(self.w.dtype)


def linear(
    x: Float[Array, "*rows i"],
    w: Float[Array, "o i"] | LowRank,
    bias: Float[Array, "o"] | None = None,
    *,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "*rows o"]:
    """Compute x w^T + bias, with accumulation in float32.

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
