"""The decoder, from input embeddings to logits over text tokens.

The decoder is Gemma2 (Gemma Team 2024) or Llama 3 (Llama Team 2024). The fields of `DecoderConfig`
describe the differences: norms, activation, soft caps, sliding windows, and the scaling of
embeddings and of rotary frequencies.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ovis_jax.config import DecoderConfig
from ovis_jax.model import kv_cache
from ovis_jax.model.attention_kernels import KernelSetting, prompt_attention
from ovis_jax.model.kv_cache import Cache, CacheBlock, KVCacheDtype
from ovis_jax.model.layers import ACTIVATIONS, apply_rope, rms_norm, softcap
from ovis_jax.model.linear import Weight, init_weight, linear, weight_param
from ovis_jax.model.plain_attention import attend, visible
from ovis_jax.model.quantized_kv import quantize_kv
from ovis_jax.sharding import constrain


class DecoderAttention(nn.Module):
    """Grouped-query attention, with a sliding window in local blocks."""

    config: DecoderConfig
    window: int | None
    param_dtype: DTypeLike
    kernel_setting: KernelSetting = KernelSetting()
    int8_cache: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: CacheBlock | None,
        rows: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], CacheBlock]:
        """Attend to the positions in this call and in the cache.

        With `rows`, the positions continue these rows of the cache, which may have other rows, too.
        Otherwise, T is 1 and each row of the cache is continued by one position.

        Returns:
          The output, and the updated cache or, without a cache, the keys and values from this call.
        """
        c = self.config
        B, T, D = x.shape
        N, K, H = c.num_heads, c.num_kv_heads, c.head_dim

        def weight(name: str, out_size: int, in_size: int) -> Weight:
            return weight_param(self, name, (out_size, in_size), self.param_dtype)

        q = _constrain(linear(x, weight("q", N * H, D)).reshape(B, T, N, H), "B T N H")
        k = _constrain(linear(x, weight("k", K * H, D)).reshape(B, T, K, H), "B T K H")
        v = _constrain(linear(x, weight("v", K * H, D)).reshape(B, T, K, H), "B T K H")
        q, k = (apply_rope(x, positions, c.rope_theta, c.rope_scaling) for x in (q, k))
        key_value = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]
        if self.int8_cache:
            key_value = quantize_kv(key_value[0]), quantize_kv(key_value[1])
        options = {"scale": c.query_pre_attn_scalar**-0.5, "cap": c.attn_softcap}
        if cache is not None and rows is not None:
            cache, key_value = kv_cache.delay_reading(cache, key_value)
        if cache is None:
            options |= {"window": self.window, "setting": self.kernel_setting}
            keys, values = kv_cache.as_arrays(key_value, x.dtype)
            out = prompt_attention(q, keys, values, positions, **options)  # [B, T, N, H]
        elif rows is not None and self.window is not None:
            # The cache is updated afterwards, because the first queries still need the ring
            # buffer's old slots.
            past = kv_cache.slot_positions(positions[:, 0], kv_cache.length(cache))
            mask = visible(positions, jnp.concatenate([past, positions], axis=1), self.window)
            old = kv_cache.take_rows(cache, rows)
            keys, values = jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), old, key_value)
            out = attend(q, keys, values, mask, **options)  # [B, T, N, H]
            new = kv_cache.append_chunk(old, key_value, positions)
            key_value = kv_cache.put_chunk(cache, new, positions, rows)
        else:
            if rows is None:
                read = key_value = kv_cache.append_token(cache, key_value, positions)
            else:
                old = kv_cache.take_rows(cache, rows)
                read = kv_cache.append_chunk(old, key_value, positions)
                key_value = kv_cache.put_chunk(cache, read, positions, rows)
            lengths = jnp.max(positions, axis=1) + 1
            key_positions = kv_cache.slot_positions(lengths, kv_cache.length(read))
            mask = visible(positions, key_positions, self.window)
            out = attend(q, *read, mask, **options)  # [B, T, N, H]
        o = weight("o", D, N * H)
        return linear(out.reshape(B, T, N * H), o), key_value


class GatedMLP(nn.Module):
    """A gated MLP: the activation of one projection is multiplied by another projection."""

    config: DecoderConfig
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the MLP to each position."""
        D, F = self.config.width, self.config.mlp_width
        activation = ACTIVATIONS[self.config.activation]
        gate = weight_param(self, "gate", (F, D), self.param_dtype)
        up = weight_param(self, "up", (F, D), self.param_dtype)
        down = weight_param(self, "down", (D, F), self.param_dtype)
        hidden = _constrain(activation(linear(x, gate)) * linear(x, up), "B T F")
        return linear(hidden, down)


class DecoderBlock(nn.Module):
    """A transformer block with norms before and, in Gemma2, after both attention and the MLP."""

    config: DecoderConfig
    window: int | None
    param_dtype: DTypeLike
    kernel_setting: KernelSetting = KernelSetting()
    int8_cache: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: CacheBlock | None,
        rows: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], CacheBlock]:
        """Add attention, then the MLP, to the residual; `DecoderAttention` describes the cache."""
        c = self.config

        def norm(name: str, x: Array) -> Array:
            scale = self.param(name, _init_norm(c), (c.width,), self.param_dtype)
            return rms_norm(x, scale, c.norm_eps, c.norm_offset)

        attn = DecoderAttention(
            c, self.window, self.param_dtype, self.kernel_setting, self.int8_cache, name="attn"
        )
        y, key_value = attn(norm("pre_attn_norm", x), positions, cache, rows)
        x += norm("post_attn_norm", y) if c.post_norms else y
        y = GatedMLP(c, self.param_dtype, name="mlp")(norm("pre_mlp_norm", x))
        x += norm("post_mlp_norm", y) if c.post_norms else y
        return x, key_value


def _constrain(x: Float[Array, "B T ..."], axes: str) -> Array:
    """Constrain the sharding of an activation, except in a decode step.

    For a single position per row, moving activations between devices is cheaper than gathering
    weights that are sharded over "data".
    """
    return constrain(x, axes) if x.shape[1] > 1 else x


def _init_norm(config: DecoderConfig) -> nn.initializers.Initializer:
    """Return an initializer for the scale of a norm, so that the new norm multiplies by 1."""
    return nn.initializers.constant(1 - config.norm_offset)


def scale_embeddings(config: DecoderConfig, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Multiply embeddings by sqrt(D), rounded to the dtype of `x`, if the config requires it."""
    return x * jnp.asarray(math.sqrt(x.shape[-1]), x.dtype) if config.scale_embeddings else x


def unembed(
    config: DecoderConfig,
    x: Float[Array, "B T D"],
    norm: Float[Array, "D"],
    table: Weight,
) -> Float[Array, "B T V"]:
    """Compute float32 logits from the last block's output: final norm, output matrix, soft capping.

    Args:
      config: Config of the norm and the soft cap.
      x: Output of the last block.
      norm: Scale of the final norm.
      table: The output matrix, one row per token.
    """
    x = rms_norm(x, norm, config.norm_eps, config.norm_offset)
    return softcap(linear(x, table, out_dtype=jnp.float32), config.final_softcap)


class DecoderOutput(NamedTuple):
    """Output of `Decoder`.

    Attributes:
      logits: Float32 logits; T is 1 if only one position was requested.
      key_values: For each block, the keys and values of the prompt, or the updated cache.
      hidden_states: Output of each block.
    """

    logits: Float[Array, "B T V"]
    key_values: tuple[CacheBlock, ...]
    hidden_states: tuple[Float[Array, "B T D"], ...]


class Decoder(nn.Module):
    """The decoder, which takes input embeddings. It computes in the dtype of its input.

    Attributes:
      config: Config of the decoder.
      param_dtype: Dtype of the parameters that `init` creates.
      remat: Whether the backward pass recomputes each block instead of storing its activations.
      kernel_setting: Attention kernel for prompts.
      kv_cache_dtype: Dtype of the KV cache. For an int8 cache, keys and values are rounded before
        any attention, so that results do not depend on how a prompt is divided into chunks.
    """

    config: DecoderConfig
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    kernel_setting: KernelSetting = KernelSetting()
    kv_cache_dtype: KVCacheDtype = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: Cache | None = None,
        columns: Int[Array, "B"] | None = None,
        max_length: int | None = None,
        rows: Int[Array, "B"] | None = None,
    ) -> DecoderOutput:
        """Run all blocks.

        Args:
          x: Input embeddings, before any scaling by sqrt(D).
          positions: Positions, from 0 in each row; -1 at padding. With a cache, the positions
            continue each row, and padding must be on the right.
          cache: KV cache of the positions read so far; None for full prompts. T is 1, unless there
            are `rows`.
          columns: Index in axis T, one per row, for which logits are computed; None for all
            indices.
          max_length: Number of positions in the cache that is built from full prompts; None for no
            cache.
          rows: The row of the cache that each row of `x` continues; None if the cache has the same
            rows as `x`.

        Returns:
          The logits, [B, T, V] or, with `columns`, [B, 1, V]; for each block, the keys and values
          [B, K, T, H] of the prompts or the updated cache; and the hidden states.
        """
        c = self.config
        V, D = c.vocab_size, c.width
        embed = self.param("embed", nn.initializers.normal(D**-0.5), (V, D), self.param_dtype)
        x = scale_embeddings(c, x)
        make_block = nn.remat(DecoderBlock) if self.remat else DecoderBlock
        has_cache = cache is not None or max_length is not None
        int8_cache = has_cache and self.kv_cache_dtype == "int8"
        key_values, hidden_states = [], []
        for i in range(c.depth):
            block = make_block(
                c, c.window(i), self.param_dtype, self.kernel_setting, int8_cache, name=f"block_{i}"
            )
            x = _constrain(x, "B T D")
            x, key_value = block(x, positions, None if cache is None else cache.blocks[i], rows)
            if max_length is not None:
                slots = kv_cache.num_slots(c, i, max_length, self.kv_cache_dtype)
                key_value = kv_cache.cache_prompt(key_value, positions, slots)
                # Without the barrier, XLA keeps every block's output and keys until the end on a
                # GPU, and builds all caches in one pass.
                x, key_value = jax.lax.optimization_barrier((x, key_value))
            key_values.append(key_value)
            hidden_states.append(x)
        if columns is not None:
            x = jnp.take_along_axis(x, columns[:, None, None], axis=1)  # [B, 1, D]
        norm = self.param("final_norm", _init_norm(c), (D,), self.param_dtype)
        table = embed
        if not c.tie_embeddings:
            table = self.param("unembed", init_weight, (V, D), self.param_dtype)
        logits = unembed(c, x, norm, table)
        return DecoderOutput(logits, tuple(key_values), tuple(hidden_states))
