"""Statistics of the visual words in an image, and of the model's certainty about them.

Every visual token is a distribution over visual words, which are the rows of the visual embedding
table.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from ovis_jax.argument_type_checks import check_argument_types
from ovis_jax.errors import RequestError
from ovis_jax.inputs.batch import Inputs
from ovis_jax.mesh import allow_explicit_mesh
from ovis_jax.model.linear import Quantized, linear
from ovis_jax.model.ovis import Ovis, Params, activation_dtype
from ovis_jax.model.visual_tokenizer import VisualTokens, scan_visual_tokens, tokenize


class VisualWords(NamedTuple):
    """Statistics of the M visual tokens in each crop, row by row on a square grid.

    Attributes:
      words: The k most likely words for each token, most likely first, as row indices in the visual
        embedding table.
      probabilities: The probabilities of these words.
      entropy: Entropy of each token's distribution in nats. The range is from 0 (a single word) to
        log(number of words).
      total: Sum of each token's distribution, which is 1 up to rounding.
      mean: Mean of the distributions of a crop's tokens, which shows how much the crop uses each
        word.
    """

    words: Int[Array, "I M k"]
    probabilities: Float[Array, "I M k"]
    entropy: Float[Array, "I M"]
    total: Float[Array, "I M"]
    mean: Float[Array, "I W"]

    @property
    def effective(self) -> Float[Array, "I M"]:
        """The effective number of words for each token: exp(entropy), which is at least 1."""
        return jnp.exp(self.entropy)


class SharedWords(NamedTuple):
    """The visual words that two images share.

    Attributes:
      mass: Shared probability, from 0 to 1: for each word, the smaller of the two images' mean
        probabilities, summed over all words.
      words: The k words with the most shared probability, in decreasing order.
      first: Mean probability of these words in the first image.
      second: Mean probability of these words in the second image.
    """

    mass: Float[Array, ""]
    words: Int[Array, "k"]
    first: Float[Array, "k"]
    second: Float[Array, "k"]


def visual_words(model: Ovis, params: Params, inputs: Inputs, *, k: int = 10) -> VisualWords:
    """Summarize the distribution of every visual token.

    The function is pure, so it can be called inside a jitted function or under a mesh. The
    distributions are computed in chunks, as in `generate`, so that memory is bounded. For every
    model dtype, they are computed from the logits in float32, without the noise of gumbel_argmax.

    Args:
      model: Static.
      params: Parameters of the model, on any device or mesh. Padding words are left out of the
        result.
      inputs: Model inputs from `Processor`; only the pixels are used.
      k: Number of most likely words per token in the result; static.

    Returns:
      The statistics of all crops in order of appearance, in float32.

    Raises:
      RequestError: `k` is below 1 or above the number of words, or the inputs contain no crops.
      TypeError: `model`, `params` or `inputs` has the wrong type.
    """
    check_argument_types(
        "visual_words", model=(model, Ovis), params=(params, Mapping), inputs=(inputs, Inputs)
    )
    _check_k(k, model.config.visual_tokenizer.num_words, "visual words")
    if not len(inputs.pixels):
        raise RequestError("visual_words: the inputs contain no image")
    return _visual_words(model, params, inputs, k)


@partial(jax.jit, static_argnums=(0, 3))
@allow_explicit_mesh
def _visual_words(model: Ovis, params: Params, inputs: Inputs, k: int) -> VisualWords:
    c = model.config.visual_tokenizer

    def summarize(sums: Array, tokens: VisualTokens) -> tuple[Array, tuple[Array, ...]]:
        logits = tokens.logits[..., : c.num_words].astype(jnp.float32)
        p = tokenize(logits, c.tokenize_function)
        entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)
        probabilities, words = jax.lax.top_k(p, k)
        return sums + p.sum(axis=1), (words, probabilities, entropy, p.sum(axis=-1))

    features = model.encode_vision(params, jnp.asarray(inputs.pixels))[-1]
    sums = jnp.zeros((len(features), c.num_words), jnp.float32)
    sums, (words, probabilities, entropy, total) = scan_visual_tokens(
        c, params["visual_tokenizer"], features, summarize, sums
    )
    return VisualWords(words, probabilities, entropy, total, sums / c.tokens_per_crop)


@partial(jax.jit, static_argnames="k")
@allow_explicit_mesh
def shared_words(
    first: Float[Array, "W"], second: Float[Array, "W"], *, k: int = 10
) -> SharedWords:
    """Find the visual words that two images share, given how much each image uses each word.

    Args:
      first: Mean distribution of the first image, such as the mean of `VisualWords.mean` over its
        crops.
      second: Mean distribution of the second image.
      k: Number of words in the result; static.

    Raises:
      RequestError: `k` is below 1 or above the number of words.
    """
    _check_k(k, first.shape[-1], "visual words")
    shared = jnp.minimum(first, second)
    _, words = jax.lax.top_k(shared, k)
    return SharedWords(jnp.sum(shared), words, first[words], second[words])


@partial(jax.jit, static_argnames="k")
@allow_explicit_mesh
def nearest_tokens(
    params: Params, embeddings: Float[Array, "n D"], *, k: int = 5
) -> tuple[Int[Array, "n k"], Float[Array, "n k"]]:
    """Find the text tokens whose embeddings have the largest cosine similarity to given embeddings.

    Args:
      params: Parameters of the complete model.
      embeddings: Embeddings to compare with, such as rows of the visual embedding table,
        `params["visual_embedding"][words]`. The function creates a float32 array [n, V].
      k: Number of tokens per embedding; static.

    Returns:
      The token ids, nearest first, and their cosine similarities in float32.

    Raises:
      RequestError: `k` is below 1 or above the number of tokens.
      TypeError: `params` is not a dict.
    """
    check_argument_types("nearest_tokens", params=(params, Mapping))
    table = params["decoder"]["embed"]
    _check_k(k, table.shape[0], "text tokens")
    if isinstance(table, Quantized):
        dtype = activation_dtype(params)
        table_norms = jnp.maximum(_norms(table.q) * table.scale, _MIN_NORM)
    else:
        dtype, table_norms = table.dtype, _norms(table)
    products = linear(embeddings.astype(dtype), table, out_dtype=jnp.float32)
    cosines = products / (_norms(embeddings)[:, None] * table_norms[None])
    found, ids = jax.lax.top_k(cosines, k)
    return ids, found


_MIN_NORM = 1e-15  # so that the cosine with a row of zeros is 0


def _norms(rows: Shaped[Array, "n D"]) -> Float[Array, "n"]:
    return jnp.maximum(jnp.linalg.norm(rows.astype(jnp.float32), axis=-1), _MIN_NORM)


def _check_k(k: int, maximum: int, what: str) -> None:
    if not 1 <= k <= maximum:
        raise RequestError(f"k is {k}, expected 1 to {maximum}: there are {maximum} {what}")
