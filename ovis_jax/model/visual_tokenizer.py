"""The visual tokenizer (Lu et al. 2024, Ovis), from patch features to visual embeddings.

Each 2 x 2 block of patches becomes one visual token. A visual token is a distribution over visual
words, which are rows of the visual embedding table. The embedding of a visual token is the mean of
these rows, weighted by the distribution.

On a mesh, the head and the table may end with padding rows (see `ovis_jax.sharding.param_shapes`).
Padding words have probability zero. The number of real words is in the config.
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
from ovis_jax.model.cpu import float32_product
from ovis_jax.model.layers import LayerNorm
from ovis_jax.model.linear import Quantized, init_weight, linear
from ovis_jax.sharding import constrain, size_per_device

VISUAL_TOKENS_PER_CHUNK = 512
"""Number of visual tokens per device whose distributions `scan_visual_tokens` holds at a time.

A float32 distribution over 65536 words takes 256 KiB, and several copies exist at once. With 512
tokens, the matrix products still take longer than reading the head and the table again for each
chunk.
"""


class VisualTokens(NamedTuple):
    """The results of each stage in the visual tokenizer, for the M tokens in each crop.

    Attributes:
      features: The merged patch features.
      logits: The output of the head and its LayerNorm.
      probabilities: The distributions over visual words.
    """

    features: Float[Array, "I M merged"]
    logits: Float[Array, "I M W"]
    probabilities: Float[Array, "I M W"]


def merge_patches(features: Float[Array, "I P E"], stride: int) -> Float[Array, "I M merged"]:
    """Concatenate the features in each block of stride x stride patches.

    At the right and bottom edges, the square grid of patches is padded with zeros to a multiple of
    `stride`. The order within a merged vector is (row in block, column in block, channel).
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
    tau: float = 1.0,
) -> Float[Array, "I M W"]:
    """Convert logits to distributions over visual words, like the original's `tokenize_function`.

    The two argmax functions are constant almost everywhere, so straight-through estimators replace
    their gradients (Bengio et al. 2013): the backward pass uses the gradient of another function.

    Args:
      logits: Logits of the words.
      function: "softmax" is the function of the published models and is computed in float32.
        "st_argmax" gives all the weight to the most likely word; its gradient is that of the logits
        themselves. "gumbel_argmax" (Jang et al. 2017) gives all the weight to a word that is
        sampled from the softmax, in inference and in training; its gradient is that of the softmax
        of (logits + noise) / `tau`.
      key: Random key for "gumbel_argmax"; None for the most likely word.
      num_words: Number of real words. All further words are padding and get probability zero.
      tau: Temperature of "gumbel_argmax". It does not change which word is sampled.

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
        # The noise has the shape of the real words, so that padding does not change the sampled
        # word.
        noise = jax.random.gumbel(key, (*logits.shape[:-1], num_words), jnp.float32)
        scores += jnp.pad(noise, ((0, 0), (0, 0), (0, columns - num_words)))
    hard = jax.nn.one_hot(jnp.argmax(scores, axis=-1), columns, dtype=logits.dtype)
    soft = scores if function == "st_argmax" else jax.nn.softmax(scores / tau, axis=-1)
    return _straight_through(hard, soft.astype(logits.dtype))


@jax.custom_jvp
def _straight_through(hard: Float[Array, "I M W"], soft: Float[Array, "I M W"]) -> Array:
    """Return `hard` with the derivative of `soft`; a program without derivatives drops `soft`."""
    return hard


_straight_through.defjvps(None, lambda tangent, *_: tangent)


def embed_words(
    probabilities: Float[Array, "I M W"], table: Float[Array, "U D"] | Quantized
) -> Float[Array, "I M D"]:
    """Compute the mean of the table's rows, weighted by each distribution.

    The distributions are padded to the number of rows in the table, because slicing the table would
    copy it. The scales of a quantized table are multiplied into the distributions.
    """
    dtype, missing = probabilities.dtype, table.shape[0] - probabilities.shape[-1]
    weights = jnp.pad(probabilities, ((0, 0), (0, 0), (0, missing)))
    if isinstance(table, Quantized):
        weights = (weights.astype(jnp.float32) * table.scale[None, None]).astype(dtype)
        table = table.q.astype(dtype)
    return constrain(float32_product("IMW,WD->IMD", weights, table).astype(dtype), "B M D")


class VisualTokenizer(nn.Module):
    """The head, the LayerNorm over the visual words, and the tokenize function.

    Logits and probabilities have one value for each row of the head, including padding rows.

    Attributes:
      config: Config of the visual tokenizer.
      param_dtype: Dtype of the parameters that `init` creates.
    """

    config: VisualTokenizerConfig
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, merged: Float[Array, "I M merged"], key: Key[Array, ""] | None = None
    ) -> VisualTokens:
        """Tokenize merged patch features; `key` is a random key for "gumbel_argmax"."""
        c = self.config
        rows = c.num_words
        if self.has_variable("params", "head"):
            # The head may be padded. The first leaf of a LowRank or Quantized is the matrix.
            rows = max(rows, jax.tree.leaves(self.get_variable("params", "head"))[0].shape[0])
        head = self.param("head", init_weight, (rows, c.merged_width), self.param_dtype)
        norm = LayerNorm(c.norm_eps, self.param_dtype, c.num_words, name="norm")
        logits = constrain(norm(linear(merged, head)), "B M W")
        probabilities = tokenize(logits, c.tokenize_function, key, c.num_words, c.tau)
        return VisualTokens(merged, logits, probabilities)


def scan_visual_tokens(
    config: VisualTokenizerConfig,
    params: dict[str, Any],
    features: Float[Array, "I P E"],
    function: Callable[[Any, VisualTokens], tuple[Any, Any]],
    carry: Any,
    key: Key[Array, ""] | None = None,
) -> tuple[Any, Any]:
    """Apply a function to all visual tokens in chunks, to bound the memory.

    A chunk has m tokens from every crop, so crops that are sharded over devices stay on their
    device. The number of chunks divides M, so no chunk is padded. With several chunks, the backward
    pass computes the distributions again instead of storing them.

    Args:
      config: Config of the visual tokenizer.
      params: Parameters of the visual tokenizer.
      features: Output of the vision encoder.
      function: Function that takes the carry and a chunk's `VisualTokens`, and returns the new
        carry and arrays [I, m, ...]. On a mesh, the logits and probabilities include padding words.
      carry: The carry for the first call.
      key: Random key for "gumbel_argmax"; each chunk samples with its own key.

    Returns:
      The final carry, and the arrays from all chunks, concatenated to [I, M, ...].
    """
    merged = merge_patches(features, config.hidden_stride)
    crops, M, width = merged.shape
    local_crops = size_per_device("B", crops, features)
    min_chunks = min(-(local_crops * M // -VISUAL_TOKENS_PER_CHUNK), M)
    chunks = next(n for n in range(min_chunks, M + 1) if M % n == 0)
    tokenizer = VisualTokenizer(config)

    def step(carry: Any, chunk: tuple[Array, Array]) -> tuple[Any, Any]:
        number, x = chunk
        chunk_key = key if key is None or chunks == 1 else jax.random.fold_in(key, number)
        x = constrain(x, "B M merged")
        tokens = cast(VisualTokens, tokenizer.apply({"params": params}, x, chunk_key))
        return function(carry, tokens)

    if chunks > 1:
        step = jax.checkpoint(step, prevent_cse=False)
    x = merged.reshape(crops, chunks, M // chunks, width).swapaxes(0, 1)
    carry, out = jax.lax.scan(step, carry, (jnp.arange(chunks), x))  # [chunks, I, m, ...]
    return carry, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(crops, M, *x.shape[3:]), out)
