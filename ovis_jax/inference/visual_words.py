"""A look inside the visual vocabulary: which visual words the model sees where, and how surely.

Every visual token is a distribution over the rows of the visual embedding table, its visual words.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ovis_jax.errors import RequestError
from ovis_jax.inputs.batch import Inputs
from ovis_jax.mesh_axes import under_any_mesh
from ovis_jax.model.layers import exact
from ovis_jax.model.ovis import Ovis, Params
from ovis_jax.model.visual_tokenizer import VisualTokens, tokenize


class VisualWords(NamedTuple):
    """What each visual token of each crop is made of; float32, over the true words alone.

    The M tokens of a crop stand row by row, on a square grid.
    """

    words: Int[Array, "I M k"]
    """The likeliest words of each token, as rows of the visual embedding table; likeliest first."""
    probabilities: Float[Array, "I M k"]
    """Of these words."""
    entropy: Float[Array, "I M"]
    """Of each token's distribution, in nats: 0 for one word alone, log(number of words) for all."""
    total: Float[Array, "I M"]
    """The sum of each token's distribution: 1, up to rounding."""
    mean: Float[Array, "I words"]
    """The mean of the distributions of a crop's tokens: how much a word is used in it."""

    @property
    def effective(self) -> Float[Array, "I M"]:
        """The effective number of words of each token: exp(entropy), from 1 on."""
        return jnp.exp(self.entropy)


class SharedWords(NamedTuple):
    """The words that two images have in common."""

    mass: Float[Array, ""]
    """The probability that the mean distributions share, from 0 to 1: the sum of the smaller."""
    words: Int[Array, "k"]
    """The words that share most, most first."""
    first: Float[Array, "k"]
    """Their mean probability in the first image."""
    second: Float[Array, "k"]
    """Their mean probability in the second image."""


@partial(jax.jit, static_argnames=("model", "k"))
@under_any_mesh
def visual_words(model: Ovis, params: Params, inputs: Inputs, *, k: int = 10) -> VisualWords:
    """What each visual token is made of.

    Pure, so it may be called inside the caller's own `jax.jit` or mesh. The distributions are
    looked at a part at a time, as in `generate`, and are never all in memory. They are computed in
    float32 from the logits, whatever the dtype of the model, without the noise of gumbel_argmax.

    Args:
      model: static.
      params: of the model, on any device or mesh; what pads the words on a mesh is left out.
      inputs: from `Processor`; their pixels are looked at, crops in order of appearance.
      k: how many of the likeliest words to give for each token, static.

    Raises:
      RequestError: `k` is below 1 or above the number of words, or there is no crop.
    """
    c = model.config.visual_tokenizer
    _check_k(k, c.num_words, "visual words")
    if not len(inputs.pixels):
        raise RequestError("visual_words: the inputs hold no image")

    def look(used: Array, tokens: VisualTokens) -> tuple[Array, tuple[Array, ...]]:
        logits = tokens.logits[..., : c.num_words].astype(jnp.float32)
        p = tokenize(logits, c.tokenize_function)
        entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)
        probabilities, words = jax.lax.top_k(p, k)
        return used + p.sum(axis=1), (words, probabilities, entropy, p.sum(axis=-1))

    pixels = jnp.asarray(inputs.pixels)
    unused = jnp.zeros((len(pixels), c.num_words), jnp.float32)
    used, (words, probabilities, entropy, total) = model.scan_words(params, pixels, look, unused)
    return VisualWords(words, probabilities, entropy, total, used / c.tokens_per_crop)


@partial(jax.jit, static_argnames="k")
@under_any_mesh
def shared_words(
    first: Float[Array, "words"], second: Float[Array, "words"], *, k: int = 10
) -> SharedWords:
    """Compare how much two images use each word.

    Args:
      first: how much each word is used in the first image, such as the mean over its crops of
        `VisualWords.mean`.
      second: the same for the other.
      k: how many words to give, static.

    Raises:
      RequestError: `k` is below 1 or above the number of words.
    """
    _check_k(k, first.shape[-1], "visual words")
    both = jnp.minimum(first, second)
    _, words = jax.lax.top_k(both, k)
    return SharedWords(jnp.sum(both), words, first[words], second[words])


@partial(jax.jit, static_argnames="k")
@under_any_mesh
def nearest_tokens(
    params: Params, embeddings: Float[Array, "n D"], *, k: int = 5
) -> tuple[Int[Array, "n k"], Float[Array, "n k"]]:
    """The text tokens whose embeddings have the largest cosine with each of some embeddings.

    Args:
      params: of the whole model.
      embeddings: such as rows of the visual embedding table, `params["visual_embedding"][words]`.
        A float32 array [n, V] is made for them.
      k: how many tokens to give for each, static.

    Returns:
      The ids, nearest first, and the cosines, float32.

    Raises:
      RequestError: `k` is below 1 or above the number of tokens.
    """
    table = params["decoder"]["embed"]
    _check_k(k, table.shape[0], "text tokens")
    products = jnp.einsum(
        "nD,VD->nV",
        embeddings.astype(table.dtype),
        table,
        precision=exact(table),
        preferred_element_type=jnp.float32,
    )
    cosines = products / (_lengths(embeddings)[:, None] * _lengths(table))
    found, ids = jax.lax.top_k(cosines, k)
    return ids, found


def _lengths(rows: Float[Array, "n D"]) -> Float[Array, "n"]:
    """The length of each row, and something above 0 for a row of zeros, whose cosine is then 0."""
    return jnp.maximum(jnp.linalg.norm(rows.astype(jnp.float32), axis=-1), 1e-15)


def _check_k(k: int, most: int, what: str) -> None:
    if not 1 <= k <= most:
        raise RequestError(f"k is {k}, expected 1 to {most}: there are {most} {what}")
