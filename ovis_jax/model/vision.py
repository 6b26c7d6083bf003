"""The SigLIP vision encoder (Zhai et al. 2023), which computes a feature vector for each patch.

Ovis uses the output of the last block directly. SigLIP's final LayerNorm and pooling head are not
used, so they are not implemented.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from ovis_jax.config import VisionConfig
from ovis_jax.model.attention_kernels import KernelSetting, crop_attention
from ovis_jax.model.layers import LayerNorm, gelu
from ovis_jax.model.linear import init_weight, linear
from ovis_jax.sharding import constrain


def patchify(pixels: Float[Array, "I h w C"], patch_size: int) -> Float[Array, "I P patch"]:
    """Cut crops into patches, row by row.

    Args:
      pixels: The crops. Pixels at the right and bottom edges that do not fill a patch are dropped.
      patch_size: Height and width of a patch in pixels.

    Returns:
      The values of each patch, in the order (C, row, column).
    """
    I, h, w, C = pixels.shape  # noqa: E741
    rows, columns = h // patch_size, w // patch_size
    x = pixels[:, : rows * patch_size, : columns * patch_size]
    x = x.reshape(I, rows, patch_size, columns, patch_size, C)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(I, rows * columns, C * patch_size**2)


class VisionAttention(nn.Module):
    """Attention in which every patch attends to all patches in its crop."""

    config: VisionConfig
    param_dtype: DTypeLike
    kernel_setting: KernelSetting = KernelSetting()

    @nn.compact
    def __call__(self, x: Float[Array, "I P E"]) -> Float[Array, "I P E"]:
        """Attend within each crop."""
        I, P, E = x.shape  # noqa: E741
        A = self.config.num_heads
        H = E // A

        def project(name: str, x: Array) -> Array:
            w = self.param(name, init_weight, (E, E), self.param_dtype)
            bias = self.param(f"{name}_bias", nn.initializers.zeros, (E,), self.param_dtype)
            return linear(x, w, bias)

        q, k, v = (constrain(project(name, x).reshape(I, P, A, H), "B P A H") for name in "qkv")
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [I, A, P, H]
        out = crop_attention(q, k, v, scale=H**-0.5, setting=self.kernel_setting)
        return project("o", out.reshape(I, P, E))


class VisionMLP(nn.Module):
    """Two linear layers with a GELU between them."""

    config: VisionConfig
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "I P E"]) -> Float[Array, "I P E"]:
        """Apply the MLP to each patch."""
        E, F = self.config.width, self.config.mlp_width
        zeros = nn.initializers.zeros
        up = self.param("up", init_weight, (F, E), self.param_dtype)
        up_bias = self.param("up_bias", zeros, (F,), self.param_dtype)
        down = self.param("down", init_weight, (E, F), self.param_dtype)
        down_bias = self.param("down_bias", zeros, (E,), self.param_dtype)
        return linear(constrain(gelu(linear(x, up, up_bias)), "B P F"), down, down_bias)


class VisionBlock(nn.Module):
    """A pre-norm transformer block."""

    config: VisionConfig
    param_dtype: DTypeLike
    kernel_setting: KernelSetting = KernelSetting()

    @nn.compact
    def __call__(self, x: Float[Array, "I P E"]) -> Float[Array, "I P E"]:
        """Add attention, then the MLP, to the residual."""
        c = self.config
        attn = VisionAttention(c, self.param_dtype, self.kernel_setting, name="attn")
        mlp = VisionMLP(c, self.param_dtype, name="mlp")
        x += attn(LayerNorm(c.norm_eps, self.param_dtype, name="attn_norm")(x))
        x += mlp(LayerNorm(c.norm_eps, self.param_dtype, name="mlp_norm")(x))
        return x


class VisionEncoder(nn.Module):
    """SigLIP, up to the output of its last block. It computes in the dtype of its parameters.

    Attributes:
      config: Config of the vision encoder.
      param_dtype: Dtype of the parameters that `init` creates.
      remat: Whether the backward pass recomputes each block instead of storing its activations.
      kernel_setting: Attention kernel for crops.
    """

    config: VisionConfig
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    kernel_setting: KernelSetting = KernelSetting()

    @nn.compact
    def __call__(self, pixels: Float[Array, "I h w C"]) -> tuple[Float[Array, "I P E"], ...]:
        """Encode normalized pixels; return the patch embeddings, then the output of each block."""
        c = self.config
        E, P = c.width, c.num_patches
        shape = (E, c.num_channels, c.patch_size, c.patch_size)
        init_patch = nn.initializers.lecun_normal(in_axis=(1, 2, 3), out_axis=0)
        patch = self.param("patch", init_patch, shape, self.param_dtype)
        bias = self.param("patch_bias", nn.initializers.zeros, (E,), self.param_dtype)
        position = self.param("position", nn.initializers.normal(0.02), (P, E), self.param_dtype)

        # If its stride equals its kernel size, a convolution is a matrix product with the patches.
        patches = patchify(pixels.astype(patch.dtype), c.patch_size)  # [I, P, C p p]
        x = linear(patches, patch.reshape(E, -1), bias) + position[None]  # [I, P, E]
        make_block = nn.remat(VisionBlock) if self.remat else VisionBlock
        states = [x]
        for i in range(c.depth):
            block = make_block(c, self.param_dtype, self.kernel_setting, name=f"block_{i}")
            states.append(block(constrain(states[-1], "B P E")))
        return tuple(states)
