"""The visual tokenizer: patch features -> a distribution over visual words -> visual embeddings.

A word id is an index into the rows of the visual embedding table; every 2 x 2 block of patches
becomes one visual token, whose embedding is the average of the table's rows under its distribution.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Key

from ovis_jax.config import TokenizeFunction, VisualTokenizerConfig
from ovis_jax.model.layers import exact, linear
from ovis_jax.model.vision import LayerNorm, matrix


class VisualTokens(NamedTuple):
    """What the visual tokenizer makes of crops, stage by stage."""

    features: Float[Array, "I M merged"]
    logits: Float[Array, "I M W"]
    probabilities: Float[Array, "I M W"]


def merge_patches(features: Float[Array, "I P E"], stride: int) -> Float[Array, "I M merged"]:
    """Join each stride x stride block of patches into one vector.

    The square grid of patches is padded with zeros at the right and the bottom until it divides. A
    merged vector holds its block in the order (row in block, column in block, channel).
    """
    I, P, E = features.shape  # noqa: E741
    side = round(P**0.5)
    pad = -side % stride
    blocks = (side + pad) // stride
    x = features.reshape(I, side, side, E)
    x = jnp.pad(x, ((0, 0), (0, pad), (0, pad), (0, 0)))
    x = x.reshape(I, blocks, stride, blocks, stride, E).swapaxes(2, 3)
    return x.reshape(I, blocks**2, stride**2 * E)


def tokenize(
    logits: Float[Array, "I M W"], function: TokenizeFunction, key: Key[Array, ""] | None = None
) -> Float[Array, "I M W"]:
    """Turn logits into a distribution over the visual words, in the dtype of `logits`.

    `softmax` is what the published models use; it is computed in float32. The other two give one
    word all the weight. `st_argmax` takes the likeliest. `gumbel_argmax` draws it, in inference as
    in training, with `key`; without a key it takes the likeliest. (Its temperature `tau` does not
    change which word is drawn.)
    """
    if function == "softmax":
        return jax.nn.softmax(logits.astype(jnp.float32), axis=-1).astype(logits.dtype)
    scores = logits.astype(jnp.float32)
    if function == "gumbel_argmax" and key is not None:
        scores += jax.random.gumbel(key, logits.shape)
    return jax.nn.one_hot(jnp.argmax(scores, axis=-1), logits.shape[-1], dtype=logits.dtype)


def embed_words(
    probabilities: Float[Array, "I M W"], table: Float[Array, "U D"]
) -> Float[Array, "I M D"]:
    """The mean row of the table under each distribution; the indicator rows have no part in it."""
    words = table[: probabilities.shape[-1]]  # [W, D]
    return jnp.einsum(
        "IMW,WD->IMD",
        probabilities,
        words,
        precision=exact(probabilities),
        preferred_element_type=jnp.float32,
    ).astype(probabilities.dtype)


class VisualTokenizer(nn.Module):
    """Merge, head, LayerNorm over the visual words, and softmax.

    `dtype` is that of parameters made by `init`.
    """

    config: VisualTokenizerConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "I P E"], key: Key[Array, ""] | None = None
    ) -> VisualTokens:
        """Read vision features of the last block; `key` is for `gumbel_argmax` alone."""
        c = self.config
        head = self.param("head", matrix, (c.num_words, c.merged_width), self.dtype)
        merged = merge_patches(features, c.hidden_stride)  # [I, M, m m E]
        logits = LayerNorm(c.norm_eps, self.dtype, name="norm")(linear(merged, head))  # [I, M, W]
        return VisualTokens(merged, logits, tokenize(logits, c.tokenize_function, key))
