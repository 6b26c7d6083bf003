"""The visual tokenizer: patch features -> a distribution over visual words -> visual embeddings.

A word id is an index into the rows of the visual embedding table; every 2 x 2 block of patches
becomes one visual token, whose embedding is the average of the table's rows under its distribution.

On a mesh the head and the table have rows of padding behind the true ones (see `param_shapes`). The
config alone says how many are true; a word of padding has probability zero and counts nowhere.
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
    logits: Float[Array, "I M W"],
    function: TokenizeFunction,
    key: Key[Array, ""] | None = None,
    num_words: int | None = None,
) -> Float[Array, "I M W"]:
    """Turn logits into a distribution over the visual words, in the dtype of `logits`.

    `softmax` is what the published models use; it is computed in float32. The other two give one
    word all the weight. `st_argmax` takes the likeliest. `gumbel_argmax` draws it, in inference as
    in training, with `key`; without a key it takes the likeliest. (Its temperature `tau` does not
    change which word is drawn.) Columns from `num_words` on are padding: their weight is zero.
    """
    scores, columns = logits.astype(jnp.float32), logits.shape[-1]
    num_words = num_words or columns
    if num_words < columns:
        scores = jnp.where(jnp.arange(columns) < num_words, scores, -jnp.inf)
    if function == "softmax":
        return jax.nn.softmax(scores, axis=-1).astype(logits.dtype)
    if function == "gumbel_argmax" and key is not None:
        # Noise for the true words alone, so that the same words are drawn with padding and without.
        noise = jax.random.gumbel(key, (*logits.shape[:-1], num_words))
        scores += jnp.pad(noise, ((0, 0), (0, 0), (0, columns - num_words)))
    return jax.nn.one_hot(jnp.argmax(scores, axis=-1), columns, dtype=logits.dtype)


def embed_words(
    probabilities: Float[Array, "I M W"], table: Float[Array, "U D"]
) -> Float[Array, "I M D"]:
    """The mean row of the table under each distribution; the indicator rows have no part in it.

    The table is never cut, which would copy it: what has no probability gets zero.
    """
    missing = table.shape[0] - probabilities.shape[-1]
    return jnp.einsum(
        "IMW,WD->IMD",
        jnp.pad(probabilities, ((0, 0), (0, 0), (0, missing))),
        table,
        precision=exact(probabilities),
        preferred_element_type=jnp.float32,
    ).astype(probabilities.dtype)


class VisualTokenizer(nn.Module):
    """Head, LayerNorm over the visual words, and softmax, for each merged block of patches.

    `dtype` is that of parameters made by `init`. Logits and probabilities have as many columns as
    the head that is given has rows, padding included.
    """

    config: VisualTokenizerConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, merged: Float[Array, "I M merged"], key: Key[Array, ""] | None = None
    ) -> VisualTokens:
        """Read what `merge_patches` gives; `key` is for `gumbel_argmax` alone."""
        c = self.config
        rows = c.num_words
        if self.has_variable("params", "head"):
            # It may be padded, and it may be a LowRank, whose first leaf is the matrix.
            rows = max(rows, jax.tree.leaves(self.get_variable("params", "head"))[0].shape[0])
        head = self.param("head", matrix, (rows, c.merged_width), self.dtype)
        norm = LayerNorm(c.norm_eps, self.dtype, c.num_words, name="norm")
        logits = norm(linear(merged, head))  # [I, M, W]
        probabilities = tokenize(logits, c.tokenize_function, key, c.num_words)
        return VisualTokens(merged, logits, probabilities)
