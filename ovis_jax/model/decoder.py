"""The Gemma2 decoder: input embeddings -> logits over the text vocabulary."""

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
from ovis_jax.model.attention import attend, visible
from ovis_jax.model.kernels import Setting, attend_prompt
from ovis_jax.model.kv_cache import Cache, KeyValue
from ovis_jax.model.layers import LowRank, gelu, linear, rms_norm, rope, softcap
from ovis_jax.model.vision import matrix, zeros


class Attention(nn.Module):
    """Grouped-head attention over the call's own positions, or over a cache and new ones."""

    config: DecoderConfig
    window: int | None
    dtype: DTypeLike
    attention: Setting = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: KeyValue | None,
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """Gives the output, and the call's keys and values or the cache with the new ones in it."""
        c = self.config
        B, T, D = x.shape
        N, K, H = c.num_heads, c.num_kv_heads, c.head_dim
        q = linear(x, self.param("q", matrix, (N * H, D), self.dtype)).reshape(B, T, N, H)
        k = linear(x, self.param("k", matrix, (K * H, D), self.dtype)).reshape(B, T, K, H)
        v = linear(x, self.param("v", matrix, (K * H, D), self.dtype)).reshape(B, T, K, H)
        q, k = rope(q, positions, c.rope_theta), rope(k, positions, c.rope_theta)
        keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]
        how = {"scale": c.query_pre_attn_scalar**-0.5, "cap": c.attn_softcap}
        if cache is None:
            how |= {"window": self.window, "setting": self.attention}
            out = attend_prompt(q, keys, values, positions, **how)  # [B, T, N, H]
        elif T > 1:
            # Written afterwards: in a ring, new keys lie where early queries still look.
            past = kv_cache.slot_positions(positions[:, 0], cache[0].shape[2])
            mask = visible(positions, jnp.concatenate([past, positions], axis=1), self.window)
            all_keys = jnp.concatenate([cache[0], keys], axis=2)  # [B, K, S + T, H]
            all_values = jnp.concatenate([cache[1], values], axis=2)
            out = attend(q, all_keys, all_values, mask, **how)  # [B, T, N, H]
            keys, values = kv_cache.append(cache, keys, values, positions)
        else:
            keys, values = kv_cache.write(cache, keys, values, positions[:, 0])
            key_positions = kv_cache.slot_positions(positions[:, 0] + 1, keys.shape[2])
            mask = visible(positions, key_positions, self.window)
            out = attend(q, keys, values, mask, **how)  # [B, T, N, H]
        o = self.param("o", matrix, (D, N * H), self.dtype)
        return linear(out.reshape(B, T, N * H), o), (keys, values)


class MLP(nn.Module):
    """The gated MLP."""

    config: DecoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to each position."""
        D, F = self.config.width, self.config.mlp_width
        gate = self.param("gate", matrix, (F, D), self.dtype)
        up = self.param("up", matrix, (F, D), self.dtype)
        down = self.param("down", matrix, (D, F), self.dtype)
        return linear(gelu(linear(x, gate)) * linear(x, up), down)


class Block(nn.Module):
    """A block with a norm before and after each half; the residual joins after the second norm."""

    config: DecoderConfig
    window: int | None
    dtype: DTypeLike
    attention: Setting = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: KeyValue | None,
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """Attention, then MLP."""
        c = self.config

        def norm(name: str, x: Array) -> Array:
            return rms_norm(x, self.param(name, zeros, (c.width,), self.dtype), c.norm_eps)

        attn = Attention(c, self.window, self.dtype, self.attention, name="attn")
        y, key_value = attn(norm("pre_attn_norm", x), positions, cache)
        x += norm("post_attn_norm", y)
        y = MLP(c, self.dtype, name="mlp")(norm("pre_mlp_norm", x))
        x += norm("post_mlp_norm", y)
        return x, key_value


def scale_embeddings(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Multiply by sqrt(D), the factor itself rounded to the dtype of `x` as in the original."""
    return x * jnp.asarray(math.sqrt(x.shape[-1]), x.dtype)


def unembed(
    config: DecoderConfig,
    x: Float[Array, "B T D"],
    norm: Float[Array, "D"],
    table: Float[Array, "V D"] | LowRank,
) -> Float[Array, "B T V"]:
    """The last block's output -> float32 logits: final norm, product with the table, soft cap."""
    x = rms_norm(x, norm, config.norm_eps)
    return softcap(linear(x, table, out_dtype=jnp.float32), config.final_softcap)


class DecoderOutput(NamedTuple):
    """Logits, and what each block gave."""

    logits: Float[Array, "B T V"]
    key_values: tuple[KeyValue, ...]
    hidden_states: tuple[Float[Array, "B T D"], ...]


class Decoder(nn.Module):
    """Gemma2 from input embeddings on.

    `dtype` is that of parameters made by `init`; applied, the decoder computes in the dtype of its
    input. With `remat` a block's gradient computes the block again instead of keeping it.
    `attention` is the kernel that reads prompts; see `ovis_jax.model.kernels`.
    """

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    attention: Setting = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: Cache | None = None,
        columns: Int[Array, "B"] | None = None,
        max_length: int | None = None,
    ) -> DecoderOutput:
        """Run all blocks.

        Args:
          x: input embeddings, not yet scaled.
          positions: from 0 in each row; -1 at padding. With a cache they go on where the row has
            come to, and padding is on the right only.
          cache: what each row has read so far; None for a whole prompt.
          columns: the one column of each row whose logits are wanted; None for all columns.
          max_length: positions for which a cache is begun with a whole prompt; None for no cache.

        Returns:
          Float32 logits [B, T, V] ([B, 1, V] with `columns`); keys and values of every block, of
          the prompt ([B, K, T, H]) or of the cache with the new positions in it; hidden states.
        """
        c = self.config
        V, D = c.vocab_size, c.width
        embed = self.param("embed", nn.initializers.normal(D**-0.5), (V, D), self.dtype)
        x = scale_embeddings(x)
        make_block = nn.remat(Block) if self.remat else Block
        key_values, hidden_states = [], []
        for i in range(c.depth):
            block = make_block(c, c.window(i), self.dtype, self.attention, name=f"block_{i}")
            x, key_value = block(x, positions, None if cache is None else cache.blocks[i])
            if max_length is not None:
                slots = kv_cache.num_slots(c, i, max_length)
                key_value = kv_cache.fill(*key_value, positions, slots)
                # Or a GPU keeps what each block adds, and its keys, for one pass at the end.
                x, key_value = jax.lax.optimization_barrier((x, key_value))
            key_values.append(key_value)
            hidden_states.append(x)
        if columns is not None:
            x = jnp.take_along_axis(x, columns[:, None, None], axis=1)  # [B, 1, D]
        norm = self.param("final_norm", zeros, (D,), self.dtype)
        table = embed if c.tie_embeddings else self.param("unembed", matrix, (V, D), self.dtype)
        logits = unembed(c, x, norm, table)
        return DecoderOutput(logits, tuple(key_values), tuple(hidden_states))
