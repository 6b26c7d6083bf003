"""Sampling: pure functions that choose the next token from the logits."""

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
"""The maximum of top_k, which is the largest int32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. By default, decoding is greedy.

    The compiled program omits the step for each parameter that is None. A parameter may be a number
    or an array with one value per row. These values are arguments of the program, so changing them
    does not cause recompilation. The steps have the same order as in Hugging Face transformers:
    repetition penalty, temperature, top-k, top-p.
    """

    temperature: ArrayLike | None = None
    """The logits are divided by the temperature; with None or 0, decoding is greedy."""
    top_k: ArrayLike | None = None
    """Sample only from the k most likely tokens; k is a whole number of at least 1."""
    top_p: ArrayLike | None = None
    """Sample only from the fewest most likely tokens with a total probability of at least p, in (0,
    1]."""
    repetition_penalty: ArrayLike | None = None
    """For tokens that were generated before, positive logits are divided by the penalty and
    negative logits are multiplied by it; it must be above 0. Prompt tokens are not penalized, as in
    the original, which passes prompts as embeddings."""

    def check(self, rows: int | None = None) -> None:
        """Check all values. For traced values, only the shape is checked.

        Args:
          rows: Batch size that arrays must have; None for no such check.

        Raises:
          RequestError: A value is out of range, an array does not have one value per row, or top_k
            or top_p is set without a temperature.
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
        """Convert every number to an array, so that 1 and 1.0 use the same compiled program."""
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
    """Sample one token per row.

    Args:
      logits: Float32 logits.
      sampling: The sampling parameters.
      seen: Which tokens the repetition penalty applies to; None if there is no penalty.
      key: Random key; may be None if decoding is greedy.

    Raises:
      RequestError: A temperature is given without a key.
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
    """Derive the key for sampling visual words; text token n uses `fold_in(key, n)`."""
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
    """Keep the largest logits in each row and set all others to -inf, with a single sort.

    Args:
      logits: Float32 logits.
      k: Number of tokens to keep; ties with the k-th token are also kept.
      p: Among the k tokens, keep the smallest set of most likely tokens that has at least the
        fraction p of their total probability (nucleus sampling, Holtzman et al. 2019).
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
    """Convert a number to the shape [1, 1], or one value per row to [B, 1]."""
    return jnp.reshape(jnp.asarray(value, jnp.float32), (-1, 1))
