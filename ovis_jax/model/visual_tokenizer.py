"""The visual tokenizer (Lu et al. 2024, Ovis): patch features -> visual embeddings.

Each 2 x 2 block of patches becomes one visual token. A visual token is a distribution over visual
words, which are rows of the visual embedding table, and its embedding is the mean of these rows
under the distribution.

On a mesh the head and the table end with rows of padding (see `ovis_jax.sharding.param_shapes`).
Padding words have probability zero. The config gives the number of real words.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Key

from ovis_jax.config import TokenizeFunction, VisualTokenizerConfig
from ovis_jax.model.layers import LayerNorm, matmul_precision
from ovis_jax.model.linear import init_weight, linear

VISUAL_TOKENS_PER_CHUNK = 512
"""Visual tokens whose distributions `scan_visual_tokens` holds at a time.

A float32 distribution over 65536 words takes 256 KiB, and several copies exist at once. With 512
rows the products still outweigh the cost of reading the head and the table again for each chunk.
"""


class VisualTokens(NamedTuple):
    """The stages of the visual tokenizer for the M tokens of each crop.

    Attributes:
      features: merged patch features.
      logits: after the head and its LayerNorm.
      probabilities: the distributions over visual words.
    """

    features: Float[Array, "I M merged"]
    logits: Float[Array, "I M W"]
    probabilities: Float[Array, "I M W"]


def merge_patches(features: Float[Array, "I P E"], stride: int) -> Float[Array, "I M merged"]:
    """Concatenate the features of each stride x stride block of patches.

    The square grid of patches is padded with zeros at the right and the bottom to a multiple of
    `stride`. A merged vector has the order (row in block, column in block, channel).
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
    """Turn logits into distributions over visual words, as `tokenize_function` in the original.

    Args:
      logits: one column per word.
      function: "softmax", which the published models use, in float32; "st_argmax", which gives the
        most likely word all the weight; or "gumbel_argmax", which gives all the weight to a word
        drawn from the softmax, in inference as in training. (The original's temperature `tau` does
        not change which word is drawn.)
      key: for "gumbel_argmax"; None for the most likely word.
      num_words: number of real words; columns from there on are padding with probability zero.

    Returns:
      The distributions, in the dtype of `logits`.
    """
    scores, columns = logits.astype(jnp.float32), logits.shape[-1]
    num_words = num_words or columns
    if num_words < columns:
        scores = jnp.where(jnp.arange(columns) < num_words, scores, -jnp.inf)
    if function == "softmax":
        return jax.nn.softmax(scores, axis=-1).astype(logits.dtype)
    if function == "gumbel_argmax" and key is not None:
        # The noise has the shape of the real words, so that padding does not change the draw.
        noise = jax.random.gumbel(key, (*logits.shape[:-1], num_words))
        scores += jnp.pad(noise, ((0, 0), (0, 0), (0, columns - num_words)))
    return jax.nn.one_hot(jnp.argmax(scores, axis=-1), columns, dtype=logits.dtype)


def embed_words(
    probabilities: Float[Array, "I M W"], table: Float[Array, "U D"]
) -> Float[Array, "I M D"]:
    """The mean row of the table under each distribution.

    The distributions are padded to the length of the table, as slicing the table would copy it.
    """
    missing = table.shape[0] - probabilities.shape[-1]
    return jnp.einsum(
        "IMW,WD->IMD",
        jnp.pad(probabilities, ((0, 0), (0, 0), (0, missing))),
        table,
        precision=matmul_precision(probabilities),
        preferred_element_type=jnp.float32,
    ).astype(probabilities.dtype)


class VisualTokenizer(nn.Module):
    """Head, LayerNorm over the visual words, and tokenize function.

    Logits and probabilities have one column per row of the head, including padding.

    Attributes:
      config: sizes and the tokenize function.
      dtype: dtype of the parameters that `init` creates.
    """

    config: VisualTokenizerConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, merged: Float[Array, "I M merged"], key: Key[Array, ""] | None = None
    ) -> VisualTokens:
        """Tokenize merged patch features; `key` is for "gumbel_argmax"."""
        c = self.config
        rows = c.num_words
        if self.has_variable("params", "head"):
            # It may be padded, and it may be a LowRank, whose first leaf is the matrix.
            rows = max(rows, jax.tree.leaves(self.get_variable("params", "head"))[0].shape[0])
        head = self.param("head", init_weight, (rows, c.merged_width), self.dtype)
        norm = LayerNorm(c.norm_eps, self.dtype, c.num_words, name="norm")
        logits = norm(linear(merged, head))  # [I, M, W]
        probabilities = tokenize(logits, c.tokenize_function, key, c.num_words)
        return VisualTokens(merged, logits, probabilities)


def scan_visual_tokens(
    config: VisualTokenizerConfig,
    params: dict[str, Any],
    features: Float[Array, "I P E"],
    function: Callable[[Any, VisualTokens], tuple[Any, Any]],
    carry: Any,
    key: Key[Array, ""] | None = None,
) -> tuple[Any, Any]:
    """Apply a function to all visual tokens in chunks, so that memory is bounded.

    A chunk has m tokens of every crop, so that crops sharded over devices stay where they are. The
    number of chunks divides M, so that no chunk is padded.

    Args:
      config: of the visual tokenizer.
      params: of the visual tokenizer.
      features: output of the vision encoder.
      function: called with the carry and a chunk's `VisualTokens`, whose logits and probabilities
        have the padding columns of a head on a mesh; returns the new carry and arrays [I, m, ...].
      carry: passed to the first call.
      key: for "gumbel_argmax"; each chunk draws with a key of its own.

    Returns:
      The last carry, and the arrays of all chunks concatenated to [I, M, ...].
    """
    merged = merge_patches(features, config.hidden_stride)
    crops, M, width = merged.shape
    min_chunks = min(-(crops * M // -VISUAL_TOKENS_PER_CHUNK), M)
    chunks = next(n for n in range(min_chunks, M + 1) if M % n == 0)
    tokenizer = VisualTokenizer(config)

    def step(carry: Any, chunk: tuple[Array, Array]) -> tuple[Any, Any]:
        number, x = chunk
        chunk_key = key if key is None or chunks == 1 else jax.random.fold_in(key, number)
        tokens = cast(VisualTokens, tokenizer.apply({"params": params}, x, chunk_key))
        return function(carry, tokens)

    x = merged.reshape(crops, chunks, M // chunks, width).swapaxes(0, 1)
    carry, out = jax.lax.scan(step, carry, (jnp.arange(chunks), x))  # [chunks, I, m, ...]
    return carry, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(crops, M, *x.shape[3:]), out)
