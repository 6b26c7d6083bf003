"""The layers as free functions.

What runs in float32 whatever the activations are: the statistics of both norms, rotary angles, and
soft caps. Every function returns the dtype of its input unless it says otherwise.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

gelu = partial(jax.nn.gelu, approximate=True)
"""The tanh form, which both SigLIP and Gemma2 use."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A matrix with a low-rank adapter beside it: it stands for w + b a (Hu et al. 2021)."""

    w: Float[Array, "O I"]
    a: Float[Array, "R I"]
    b: Float[Array, "O R"]

    def merged(self) -> Float[Array, "O I"]:
        """The one matrix, added in float32, in the dtype of `w`."""
        product = jnp.matmul(
            self.b.astype(jnp.float32), self.a.astype(jnp.float32), precision="highest"
        )
        return (self.w.astype(jnp.float32) + product).astype(self.w.dtype)


def linear(
    x: Float[Array, "*rows I"],
    w: Float[Array, "O I"] | LowRank,
    bias: Float[Array, "O"] | None = None,
    *,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "*rows O"]:
    """Multiply by a weight in the checkpoint's own orientation [out, in]: the one place that does.

    Products accumulate in float32. The result has the dtype of `x`, or `out_dtype`.
    """
    out_dtype = out_dtype or x.dtype
    if isinstance(w, LowRank):
        y = linear(x, w.w, bias, out_dtype=out_dtype)
        return y + linear(linear(x, w.a), w.b, out_dtype=out_dtype)
    y = _product(x, w, np.dtype(out_dtype))
    return y if bias is None else y + bias.astype(out_dtype)


# Jitted so that a shape is traced once, not in every block; inlined, it leaves no trace itself.
@partial(jax.jit, static_argnums=2, inline=True)
def _product(x: Array, w: Array, out_dtype: DTypeLike) -> Array:
    return jax.lax.platform_dependent(
        x,
        w,
        cpu=partial(_matmul_cpu, out_dtype=out_dtype),
        default=partial(_matmul, out_dtype=out_dtype),
    )


def _matmul(x: Array, w: Array, out_dtype: DTypeLike) -> Array:
    return jnp.einsum(
        "...i,oi->...o", x, w, precision=exact(x), preferred_element_type=out_dtype
    ).astype(out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul_cpu(x: Array, w: Array, out_dtype: DTypeLike) -> Array:
    """The same product, and its gradients, as XLA's CPU backend computes them fast.

    In bfloat16 it is 5-7 times slower unless the result is float32, and 10-15 times slower with a
    single row than with two. Rows are one axis: with two, XLA transposes a bfloat16 weight, and
    before a loop over tokens it does so to a copy of them all.
    """
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1 and x.dtype != jnp.float32:
        y = _matmul(jnp.broadcast_to(rows, (2, rows.shape[1])), w, jnp.float32)[:1]
    else:
        y = _matmul(rows, w, jnp.float32)
    return y.reshape(*x.shape[:-1], w.shape[0]).astype(out_dtype)


def _matmul_cpu_forward(
    x: Array, w: Array, out_dtype: DTypeLike
) -> tuple[Array, tuple[Array, Array]]:
    return _matmul_cpu(x, w, out_dtype), (x, w)


def _matmul_cpu_backward(
    out_dtype: DTypeLike, kept: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    """What autodiff would do, in the dtype of `x` and over rows as one axis.

    Left to itself it multiplies bfloat16 in float32, 4-7 times slower; and it sums float32 over two
    axes, for which XLA computes `dy` once more in transposed order, 4 times slower than in its own.
    """
    x, w = kept
    product = partial(jnp.einsum, precision=exact(x), preferred_element_type=jnp.float32)
    dy, x_rows = dy.astype(x.dtype), x.reshape(-1, x.shape[-1])
    if x.dtype == jnp.float32:
        dw = product("ro,ri->oi", dy.reshape(-1, dy.shape[-1]), x_rows)
    else:
        # The reshape behind the transpose keeps XLA from folding it into the product, which would
        # then be one of a kind that it has in float32 only.
        dw = product("or,ri->oi", jnp.moveaxis(dy, -1, 0).reshape(w.shape[0], -1), x_rows)
    return product("...o,oi->...i", dy, w).astype(x.dtype), dw.astype(w.dtype)


_matmul_cpu.defvjp(_matmul_cpu_forward, _matmul_cpu_backward)


def exact(x: Array) -> jax.lax.Precision | None:
    """The precision for products of `x`: float32 stays float32 on accelerators that would round."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def rms_norm(
    x: Float[Array, "*rows D"], scale: Float[Array, "D"], eps: float
) -> Float[Array, "*rows D"]:
    """Gemma2's RMSNorm: the scale is stored as its distance from 1."""
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*rows E"],
    scale: Float[Array, "E"],
    bias: Float[Array, "E"],
    eps: float,
    width: int | None = None,
) -> Float[Array, "*rows E"]:
    """LayerNorm over the last axis; channels from `width` on are padding and do not count."""
    counted = None if width in (None, x.shape[-1]) else jnp.arange(x.shape[-1]) < width
    y = x.astype(jnp.float32)
    y -= jnp.mean(y, axis=-1, keepdims=True, where=counted)
    variance = jnp.mean(jnp.square(y), axis=-1, keepdims=True, where=counted)
    y *= jax.lax.rsqrt(variance + eps)
    return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def rope(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], theta: float
) -> Float[Array, "B T N H"]:
    """Rotary position embedding in the half-split form: channel h turns with channel h + H/2.

    Angles are float32; their cosine and sine are rounded to the dtype of `x`, as in the original.
    """
    H = x.shape[-1]
    half = H // 2
    # Made on the host, the power in float64: that of float32 need not be exact to the last bit on
    # every processor, and the angle at position 8000 multiplies what it misses.
    exponents = np.arange(0, H, 2, dtype=np.float32) / np.float32(H)
    powers = np.float64(theta) ** exponents.astype(np.float64)
    frequencies = np.float32(1) / powers.astype(np.float32)  # [H/2]
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softcap(x: Float[Array, "*shape"], cap: float) -> Float[Array, "*shape"]:
    """Bend float32 values smoothly into (-cap, cap)."""
    return cap * jnp.tanh(x / cap)


def table_rows(table: Float[Array, "V D"], tokens: Int[Array, "B"]) -> Float[Array, "B D"]:
    """The rows of a table, in a loop over tokens.

    XLA's CPU backend reads bfloat16 by way of float32, and would widen the whole table before the
    loop if what is read did not seem to change from step to step.
    """

    def read(table: Array, tokens: Array) -> Array:
        return table[tokens]

    def read_anew(table: Array, tokens: Array) -> Array:
        return read(*jax.lax.optimization_barrier((table, tokens)))

    return jax.lax.platform_dependent(table, tokens, cpu=read_anew, default=read)
