"""Sampling: how the next token is chosen from logits, as pure functions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Key

from ovis_jax.errors import RequestError

MAX_TOP_K = 2**31 - 1
"""The largest top_k: the largest int32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """Sampling options. By default, decoding is greedy.

    A step whose option is None is left out of the compiled program. Numbers, and arrays with one
    value per row, are arguments of the program, so another value compiles nothing. The order of the
    steps is that of Hugging Face transformers: repetition penalty, temperature, top-k, top-p.
    """

    temperature: ArrayLike | None = None
    """Divides the logits; None or 0 is greedy."""
    top_k: ArrayLike | None = None
    """Sample from the k most likely tokens; a whole number of at least 1."""
    top_p: ArrayLike | None = None
    """Sample from the fewest most likely tokens whose probabilities sum to p, in (0, 1]."""
    repetition_penalty: ArrayLike | None = None
    """Divides positive logits and multiplies negative ones of tokens that were generated before;
    above 0. The prompt does not count, as in the original, which passes prompts as embeddings."""

    def check(self, rows: int | None = None) -> None:
        """Check all values. Of traced values, only the shape is checked.

        Args:
          rows: Batch size that arrays must have; None skips this check.

        Raises:
          RequestError: A value is out of range, an array does not have one value per row, or top-k
            or top-p is set without a temperature.
        """
        check, whole = partial(self._check, rows), f"a whole number from 1 to {MAX_TOP_K}"
        check("temperature", lambda x: x >= 0, "at least 0")
        check("top_k", lambda x: (x >= 1) & (x <= MAX_TOP_K) & (x == np.floor(x)), whole)
        check("top_p", lambda x: (0 < x) & (x <= 1), "above 0 and at most 1")
        check("repetition_penalty", lambda x: x > 0, "above 0")
        if self.temperature is None and (self.top_k is not None or self.top_p is not None):
            raise RequestError(
                "sampling: top_k and top_p need a temperature; without one, decoding is greedy; "
                "set temperature=1.0 to sample"
            )

    def as_arrays(self) -> "Sampling":
        """Convert every number to an array, so that 1 and 1.0 use the same program."""
        dtypes = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
        values = (self.temperature, self.top_k, self.top_p, self.repetition_penalty)
        return Sampling(
            *(None if v is None else jnp.asarray(v, d) for v, d in zip(values, dtypes, strict=True))
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
        if not isinstance(value, Tracer) and not np.all(is_valid(np.asarray(value))):
            raise RequestError(f"sampling: {name} is {value}, expected {expected}")


def sample(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    seen: Bool[Array, "B V"] | None = None,
    key: Key[Array, ""] | None = None,
) -> Int[Array, "B"]:
    """Choose one token per row.

    Args:
      logits: float32.
      sampling: The sampling options.
      seen: The tokens that `repetition_penalty` applies to; None without a penalty.
      key: Random key; may be None if decoding is greedy.

    Raises:
      RequestError: There is a temperature but no key.
    """
    if sampling.repetition_penalty is not None and seen is not None:
        logits = apply_repetition_penalty(logits, seen, _as_column(sampling.repetition_penalty))
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
    sampled_tokens = jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
    return jnp.where(greedy, greedy_tokens, sampled_tokens)


def derive_image_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """Derive the key for sampling visual words; token n is sampled with `fold_in(key, n)`."""
    return jax.random.fold_in(key, 2**32 - 1)


def apply_repetition_penalty(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "#B 1"]
) -> Float[Array, "B V"]:
    """Apply the repetition penalty of CTRL (Keskar et al. 2019, section 4.1) to seen tokens."""
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, penalized, logits)


def top_k_top_p(
    logits: Float[Array, "B V"], k: ArrayLike | None = None, p: ArrayLike | None = None
) -> Float[Array, "B V"]:
    """Set all logits except the largest of each row to -inf, with one sort.

    Args:
      logits: float32.
      k: Number of tokens to keep; tokens that tie with the k-th are kept too.
      p: Of these, keep the fewest that reach this share of their probability (nucleus sampling,
        Holtzman et al. 2019).
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    smallest = jnp.full((logits.shape[0], 1), -jnp.inf)
    if k is not None:
        last = jnp.minimum(jnp.reshape(k, (-1, 1)), logits.shape[-1]) - 1
        last = jnp.broadcast_to(last, (logits.shape[0], 1))
        smallest = jnp.take_along_axis(ordered, last, axis=-1)
    if p is not None:
        ordered = jnp.where(ordered < smallest, -jnp.inf, ordered)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of more likely tokens
        kept = jnp.where(before < _as_column(p), ordered, jnp.inf)
        smallest = jnp.maximum(smallest, jnp.min(kept, axis=-1, keepdims=True))
    return jnp.where(logits < smallest, -jnp.inf, logits)


def _as_column(value: ArrayLike) -> Array:
    """Convert a number or one value per row to [1, 1] or [B, 1]."""
    return jnp.reshape(jnp.asarray(value, jnp.float32), (-1, 1))
