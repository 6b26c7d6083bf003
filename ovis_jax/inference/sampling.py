"""Sampling: pure functions that choose the next token from the logits."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int, Key, UInt32

from ovis_jax.errors import RequestError

MAX_TOP_K = 2**31 - 1
"""The maximum of top_k, which is the largest int32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. By default, decoding is greedy.

    The compiled program omits the step for each parameter that is None. A parameter may be a number
    or an array with one value per row. These values are arguments of the program, so changing them
    does not cause recompilation. The steps have the same order as in Hugging Face transformers:
    repetition penalty, temperature, top-k, top-p, min-p. Frequency and presence penalty follow the
    repetition penalty, as in vLLM.
    """

    temperature: ArrayLike | None = None
    """The logits are divided by the temperature; with None or 0, decoding is greedy."""
    top_k: ArrayLike | None = None
    """Sample only from the k most likely tokens; k is a whole number of at least 1."""
    top_p: ArrayLike | None = None
    """Sample only from the smallest set of most likely tokens whose total probability is at least
    p, in (0, 1]; 1 keeps all tokens. Of equally likely tokens, those with the lowest ids are
    kept."""
    repetition_penalty: ArrayLike | None = None
    """For tokens that were generated before, positive logits are divided by the penalty and
    negative logits are multiplied by it; it must be above 0. Prompt tokens are not penalized, as in
    the original, which passes prompts as embeddings."""
    frequency_penalty: ArrayLike | None = None
    """A token's logit is reduced by the penalty for each time that the token was generated
    before."""
    presence_penalty: ArrayLike | None = None
    """A token's logit is reduced once by the penalty if the token was generated before."""
    min_p: ArrayLike | None = None
    """Sample only from tokens whose probability is at least p times the highest probability; p is
    in [0, 1]."""

    @property
    def needs_counts(self) -> bool:
        """Whether a parameter depends on the tokens that were generated before."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return any(penalty is not None for penalty in penalties)

    @property
    def has_filters(self) -> bool:
        """Whether a parameter restricts the tokens that are sampled from."""
        return any(value is not None for value in (self.top_k, self.top_p, self.min_p))

    def check(self, rows: int | None = None) -> None:
        """Check all values. For traced values, only the shape is checked.

        Args:
          rows: Batch size that arrays must have; None for no such check.

        Raises:
          RequestError: A value is out of range, an array does not have one value per row, or top_k,
            top_p or min_p is set without a temperature.
        """
        check, whole = partial(self._check, rows), f"a whole number from 1 to {MAX_TOP_K}"
        check("temperature", lambda x: x >= 0, "at least 0")
        check("top_k", lambda x: (x >= 1) & (x <= MAX_TOP_K) & (x == np.floor(x)), whole)
        check("top_p", lambda x: (0 < x) & (x <= 1), "above 0 and at most 1")
        check("repetition_penalty", lambda x: x > 0, "above 0")
        check("frequency_penalty", np.isfinite, "a finite number")
        check("presence_penalty", np.isfinite, "a finite number")
        check("min_p", lambda x: (0 <= x) & (x <= 1), "from 0 to 1")
        if self.temperature is None and self.has_filters:
            raise RequestError(
                "sampling: top_k, top_p and min_p need a temperature; without one, decoding is "
                "greedy; set temperature=1.0 to sample"
            )

    def as_arrays(self) -> "Sampling":
        """Convert every number to an array, so that 1 and 1.0 use the same compiled program."""

        def put(value: ArrayLike, dtype: DTypeLike) -> Array:
            if isinstance(value, Array):
                return value.astype(dtype)
            # Explicitly, for users who disallow implicit transfers.
            return jax.device_put(np.asarray(value, dtype))

        return self.map(put)

    def map(self, function: Callable[[ArrayLike, DTypeLike], ArrayLike]) -> "Sampling":
        """Apply a function of a value and its dtype, int32 or float32, to every value but None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        dtypes = {"top_k": np.int32}
        return Sampling(
            **{
                name: None if value is None else function(value, dtypes.get(name, np.float32))
                for name, value in values.items()
            }
        )

    def _check(
        self, rows: int | None, name: str, is_valid: Callable[[Any], Any], expected: str
    ) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if rows is not None and np.shape(value) not in ((), (1,), (rows,)):
            raise RequestError(
                f"sampling: {name} has shape {np.shape(value)}, expected a number or one value for"
                f" each of {rows} rows"
            )
        if isinstance(value, Tracer):
            return
        value = np.asarray(jax.device_get(value))  # explicitly, as in `as_arrays`
        if not np.all(is_valid(value)):
            raise RequestError(f"sampling: {name} is {value}, expected {expected}")


def sample(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    counts: Int[Array, "B V"] | None = None,
    key: Key[Array, ""] | None = None,
) -> Int[Array, "B"]:
    """Sample one token per row.

    Args:
      logits: Float32 logits.
      sampling: The sampling parameters.
      counts: How often each token was generated before; None if there is no penalty.
      key: Random key; may be None if decoding is greedy.

    Raises:
      RequestError: A temperature is given without a key.
    """
    if counts is not None:
        logits = apply_penalties(logits, counts, sampling)
    greedy_tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampling.temperature is None:
        return greedy_tokens
    if key is None:
        raise RequestError("sampling with a temperature needs a key: pass jax.random.key(seed)")
    temperature = _as_column(sampling.temperature)
    greedy = temperature[:, 0] == 0
    logits = logits / jnp.where(temperature == 0, 1.0, temperature)
    if sampling.top_k is not None or sampling.top_p is not None:
        logits = top_k_top_p(logits, sampling.top_k, sampling.top_p)
    if sampling.min_p is not None:
        likelihoods = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
        logits = jnp.where(likelihoods < _as_column(sampling.min_p), -jnp.inf, logits)
    sampled_tokens = jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
    return jnp.where(greedy, greedy_tokens, sampled_tokens)


def derive_image_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """Derive the key for sampling visual words; text token n uses `fold_in(key, n)`."""
    return jax.random.fold_in(key, 2**32 - 1)


def apply_penalties(
    logits: Float[Array, "B V"], counts: Int[Array, "B V"], sampling: Sampling
) -> Float[Array, "B V"]:
    """Apply the penalties for tokens that were generated before.

    Args:
      logits: Float32 logits.
      counts: How often each token was generated before.
      sampling: The sampling parameters, of which only the penalties are used.
    """
    seen = counts > 0
    if sampling.repetition_penalty is not None:
        logits = apply_repetition_penalty(logits, seen, _as_column(sampling.repetition_penalty))
    if sampling.frequency_penalty is not None:
        logits -= _as_column(sampling.frequency_penalty) * counts.astype(jnp.float32)
    if sampling.presence_penalty is not None:
        logits -= _as_column(sampling.presence_penalty) * seen.astype(jnp.float32)
    return logits


def apply_repetition_penalty(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "#B 1"]
) -> Float[Array, "B V"]:
    """Apply the repetition penalty of CTRL (Keskar et al. 2019, section 4.1) to seen tokens."""
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, penalized, logits)


def top_k_top_p(
    logits: Float[Array, "B V"], k: ArrayLike | None = None, p: ArrayLike | None = None
) -> Float[Array, "B V"]:
    """Keep the largest logits in each row and set all others to -inf, without sorting.

    Args:
      logits: Float32 logits.
      k: Number of tokens to keep; ties with the k-th token are also kept.
      p: Fraction of the total probability of the k tokens (nucleus sampling, Holtzman et al. 2019).
        The smallest set of most likely tokens that has at least this fraction is kept, but at least
        one token. Of tokens with equal logits, those with the lowest ids are kept. With p = 1, all
        k tokens are kept. The number of tokens is the same as with `TopPLogitsWarper` in
        transformers.
    """
    keys = _ordered_bits(logits)
    if k is not None:
        num_removed = (logits.shape[-1] - jnp.reshape(k, (-1, 1))).astype(jnp.float32)
        kth = _first_key_above(keys, jnp.ones_like(logits), num_removed)
        logits = jnp.where(keys < kth, -jnp.inf, logits)
    if p is not None:
        p = _as_column(p)
        # In float32, 1 - p is less exact than p. Rounding restores a decimal p such as 0.99999. The
        # barrier keeps XLA from multiplying by the reciprocal, which has another last bit. With
        # p = 1, all logits are above the limit.
        scale = jax.lax.optimization_barrier(jnp.full_like(p, 1e7))
        removed = jnp.where(p < 1, jnp.round((1 - p) * scale) / scale, -1.0)
        probabilities = jax.nn.softmax(logits, axis=-1)
        last = _first_key_above(keys, probabilities, removed)
        last = jnp.minimum(last, jnp.max(keys, axis=-1, keepdims=True))
        tied = keys == last
        rank = jnp.cumsum(tied, axis=-1, dtype=jnp.int32)  # 1 at the lowest id
        num_from_here = (rank[:, -1:] - rank + 1).astype(jnp.float32)
        below = jnp.sum(probabilities, axis=-1, keepdims=True, where=keys < last)
        each = jnp.max(probabilities, axis=-1, keepdims=True, where=tied, initial=0.0)
        tied &= (below + num_from_here * each > removed) | (rank == 1)
        logits = jnp.where((keys > last) | tied, logits, -jnp.inf)
    return logits


def _ordered_bits(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Convert float32 numbers to integers that sort in the same order."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0 is 0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _first_key_above(
    keys: UInt32[Array, "B V"], weights: Float[Array, "B V"], limit: Float[Array, "#B 1"]
) -> UInt32[Array, "B 1"]:
    """Return the lowest key at which the sum of the weights of all keys up to it exceeds the limit.

    Each pass over the row finds two bits of the key. This is faster than sorting the vocabulary. If
    the sum of all weights does not exceed the limit, the result is the highest uint32.
    """
    digits = jnp.arange(1, 4, dtype=jnp.uint32)[None, :, None]

    def add_digit(key: Array, shift: Array) -> tuple[Array, None]:
        ends = key[:, :, None] + (digits << shift) - 1  # [B, 3, 1]
        sums = jnp.sum(jnp.where(keys[:, None] <= ends, weights[:, None], 0.0), axis=-1)
        digit = jnp.sum(sums <= limit, axis=-1, keepdims=True, dtype=jnp.uint32)
        return key + (digit << shift), None

    start = jnp.zeros((keys.shape[0], 1), jnp.uint32)
    return jax.lax.scan(add_digit, start, jnp.arange(30, -1, -2, dtype=jnp.uint32))[0]


def _as_column(value: ArrayLike) -> Array:
    """Convert a number to the shape [1, 1], or one value per row to [B, 1]."""
    return jnp.reshape(jnp.asarray(value, jnp.float32), (-1, 1))
