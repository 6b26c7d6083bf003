"""The SigLIP vision encoder: pixels of a crop -> one feature vector a patch.

Ovis reads the last block's output as it is: neither the final LayerNorm nor the pooling head of
SigLIP is used, and neither is built here.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from ovis_jax.config import VisionConfig
from ovis_jax.model.kernels import Setting, attend_crops
from ovis_jax.model.layers import gelu, layer_norm, linear

matrix = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
ones, zeros = nn.initializers.ones, nn.initializers.zeros


def patchify(pixels: Float[Array, "I h w C"], patch_size: int) -> Float[Array, "I P patch"]:
    """Cut crops into patches, row by row; channels of a patch in the order (C, row, column).

    Pixels at the right and the bottom that fill no whole patch are left out.
    """
    I, h, w, C = pixels.shape  # noqa: E741
    rows, columns = h // patch_size, w // patch_size
    x = pixels[:, : rows * patch_size, : columns * patch_size]
    x = x.reshape(I, rows, patch_size, columns, patch_size, C)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(I, rows * columns, C * patch_size**2)


class LayerNorm(nn.Module):
    """LayerNorm with scale and bias; channels from `width` on are padding."""

    eps: float
    dtype: DTypeLike
    width: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*rows E"]) -> Float[Array, "*rows E"]:
        """Normalise the last axis."""
        E = x.shape[-1]
        scale = self.param("scale", ones, (E,), self.dtype)
        bias = self.param("bias", zeros, (E,), self.dtype)
        return layer_norm(x, scale, bias, self.eps, self.width)


class Attention(nn.Module):
    """Every patch sees every patch of its crop."""

    config: VisionConfig
    dtype: DTypeLike
    attention: Setting = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "I P E"]) -> Float[Array, "I P E"]:
        """Attend within each crop."""
        I, P, E = x.shape  # noqa: E741
        A = self.config.num_heads
        H = E // A

        def project(name: str, x: Array) -> Array:
            w = self.param(name, matrix, (E, E), self.dtype)
            return linear(x, w, self.param(f"{name}_bias", zeros, (E,), self.dtype))

        q, k, v = (project(name, x).reshape(I, P, A, H) for name in "qkv")
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [I, A, P, H]
        out = attend_crops(q, k, v, scale=H**-0.5, setting=self.attention)  # [I, P, A, H]
        return project("o", out.reshape(I, P, E))


class MLP(nn.Module):
    """Two layers with a gelu between."""

    config: VisionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "I P E"]) -> Float[Array, "I P E"]:
        """Apply to each patch."""
        E, F = self.config.width, self.config.mlp_width
        up = self.param("up", matrix, (F, E), self.dtype)
        up_bias = self.param("up_bias", zeros, (F,), self.dtype)
        down = self.param("down", matrix, (E, F), self.dtype)
        down_bias = self.param("down_bias", zeros, (E,), self.dtype)
        return linear(gelu(linear(x, up, up_bias)), down, down_bias)


class Block(nn.Module):
    """A pre-norm transformer block."""

    config: VisionConfig
    dtype: DTypeLike
    attention: Setting = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "I P E"]) -> Float[Array, "I P E"]:
        """Attention, then MLP, each added to what came in."""
        eps = self.config.norm_eps
        attn, mlp = (
            Attention(self.config, self.dtype, self.attention, name="attn"),
            MLP(self.config, self.dtype, name="mlp"),
        )
        x += attn(LayerNorm(eps, self.dtype, name="attn_norm")(x))
        x += mlp(LayerNorm(eps, self.dtype, name="mlp_norm")(x))
        return x


class VisionEncoder(nn.Module):
    """SigLIP up to the last block.

    `dtype` is that of parameters made by `init`; applied, the encoder computes in the dtype of the
    parameters that it is given. With `remat` a block's gradient computes the block again instead of
    keeping it. `attention` is the kernel; see `ovis_jax.model.kernels`.
    """

    config: VisionConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    attention: Setting = "auto"

    @nn.compact
    def __call__(self, pixels: Float[Array, "I h w C"]) -> tuple[Float[Array, "I P E"], ...]:
        """Encode normalised pixels; gives the patch embeddings, then the output of each block."""
        c = self.config
        E, P = c.width, c.num_patches
        shape = (E, c.num_channels, c.patch_size, c.patch_size)
        patch = self.param(
            "patch", nn.initializers.lecun_normal(in_axis=(1, 2, 3), out_axis=0), shape, self.dtype
        )
        bias = self.param("patch_bias", zeros, (E,), self.dtype)
        position = self.param("position", nn.initializers.normal(0.02), (P, E), self.dtype)

        # A convolution whose stride is its size is a product with cut-out patches.
        patches = patchify(pixels.astype(patch.dtype), c.patch_size)  # [I, P, C p p]
        x = linear(patches, patch.reshape(E, -1), bias) + position  # [I, P, E]
        make_block = nn.remat(Block) if self.remat else Block
        states = [x]
        for i in range(c.depth):
            x = make_block(c, self.dtype, self.attention, name=f"block_{i}")(x)
            states.append(x)
        return tuple(states)
