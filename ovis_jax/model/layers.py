"""Norms, rotary position embedding, soft capping and activations.

Norm statistics, rotary angles and soft capping are computed in float32 for every activation dtype.
Each function returns the dtype of its input unless its docstring says otherwise.
"""

from collections.abc import Callable, Mapping
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int, Shaped

from ovis_jax.config import RopeScaling

gelu = partial(jax.nn.gelu, approximate=True)
"""GELU in the tanh approximation, which both SigLIP and Gemma2 use."""

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {"gelu": gelu, "silu": jax.nn.silu}
"""The activations of decoders, by their name in `DecoderConfig`."""


def matmul_precision(x: Array) -> jax.lax.Precision | None:
    """Return the precision for matrix products with `x`, so that float32 inputs are not rounded."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def over_last_axis(vector: Shaped[Array, "channels"], x: Array) -> Shaped[Array, "..."]:
    """Add leading axes to a vector to get the rank of `x`, as `jax_numpy_rank_promotion` needs."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def rms_norm(
    x: Float[Array, "*rows D"], scale: Float[Array, "D"], eps: float, offset: int = 1
) -> Float[Array, "*rows D"]:
    """Apply RMSNorm to the last axis, as in Gemma2 (`offset` 1) or in Llama (`offset` 0).

    Gemma2 multiplies by 1 + `scale` in float32 and rounds the result. Llama rounds first, and then
    multiplies by `scale`.
    """
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    if offset == 0:
        return y.astype(x.dtype) * over_last_axis(scale.astype(x.dtype), y)
    return (y * over_last_axis(offset + scale.astype(jnp.float32), y)).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*rows channels"],
    scale: Float[Array, "channels"],
    bias: Float[Array, "channels"],
    eps: float,
    unpadded_width: int | None = None,
) -> Float[Array, "*rows channels"]:
    """Apply LayerNorm to the last axis; the statistics ignore padding after `unpadded_width`."""
    full = unpadded_width in (None, x.shape[-1])
    real = None if full else over_last_axis(jnp.arange(x.shape[-1]) < unpadded_width, x)
    y = x.astype(jnp.float32)
    y -= jnp.mean(y, axis=-1, keepdims=True, where=real)
    variance = jnp.mean(jnp.square(y), axis=-1, keepdims=True, where=real)
    y *= jax.lax.rsqrt(variance + eps)
    scale, bias = (over_last_axis(z.astype(jnp.float32), y) for z in (scale, bias))
    return (y * scale + bias).astype(x.dtype)


class LayerNorm(nn.Module):
    """`layer_norm` as a module, whose parameters are the scale and the bias."""

    eps: float
    param_dtype: DTypeLike
    unpadded_width: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*rows channels"]) -> Float[Array, "*rows channels"]:
        """Normalize the last axis."""
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        return layer_norm(x, scale, bias, self.eps, self.unpadded_width)


def apply_rope(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    theta: float,
    scaling: RopeScaling | None = None,
) -> Float[Array, "B T N H"]:
    """Apply rotary position embedding (Su et al. 2021) to the channel pairs h and h + H/2.

    Angles are float32. Their cosines and sines are rounded to the dtype of `x`, as in the original.

    Args:
      x: Queries or keys.
      positions: Absolute positions, starting at 0.
      theta: Base of the frequencies.
      scaling: Scaling of the frequencies; None for no scaling.
    """
    half = x.shape[-1] // 2
    frequencies = rope_frequencies(x.shape[-1], theta, scaling)  # [H/2]
    angles = positions.astype(jnp.float32)[:, :, None, None]
    angles = angles * frequencies[None, None, None]  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Float32[np.ndarray, "half"]:
    """Return the rotary frequencies in radians per position, on the host.

    With a scaling, let n be `original_max_position_embeddings`. Frequencies with a wavelength above
    n / `low_freq_factor` are divided by `factor`. Frequencies with a wavelength below n /
    `high_freq_factor` are kept. Frequencies in between are interpolated between these two results.
    """
    # The powers are computed in float64 on the host. On some processors, the last bit of a float32
    # power is wrong, and the angle multiplies this error by the position, which can be 8000.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.float64(theta) ** exponents.astype(np.float64)
    frequencies = np.float32(1) / powers.astype(np.float32)
    if scaling is None:
        return frequencies
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    original = np.float32(scaling.original_max_position_embeddings)
    wavelengths = np.float32(2 * np.pi) / frequencies
    weight = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return (1 - weight) * frequencies / np.float32(scaling.factor) + weight * frequencies


def softcap(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """Apply soft capping to float32 values: cap * tanh(x / cap), which is in (-cap, cap).

    If the cap is None, the values are returned unchanged.
    """
    return x if cap is None else cap * jnp.tanh(x / cap)
