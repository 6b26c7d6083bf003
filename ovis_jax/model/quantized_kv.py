"""Keys and values in int8, for a KV cache that takes half the memory of bfloat16.

Each key and each value has its own scale. The quantization is symmetric: the channel of largest
magnitude becomes 127 or -127, so the error of every channel is at most 1/254 of that magnitude.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int


class QuantizedKV(NamedTuple):
    """Keys or values `q * scale`.

    Attributes:
      q: int8 numbers from -127 to 127.
      scale: float32 scale per position and head.
    """

    q: Int[Array, "B K S H"]
    scale: Float[Array, "B K S"]

    def dequantized(self, dtype: DTypeLike) -> Float[Array, "B K S H"]:
        """Return the keys or values, computed in float32 and rounded to `dtype`."""
        return (self.q.astype(jnp.float32) * self.scale[..., None]).astype(dtype)


def quantize_kv(x: Float[Array, "B K S H"]) -> QuantizedKV:
    """Round keys or values to int8."""
    y = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(y), axis=-1) / 127
    # A key of zeros has the scale zero.
    q = jnp.round(y / jnp.where(scale == 0, 1.0, scale)[..., None])
    return QuantizedKV(q.astype(jnp.int8), scale)
