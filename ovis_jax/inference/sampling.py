"""How the next token is chosen: pure functions of logits."""

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

MOST = 2**31 - 1
"""The largest top_k: what int32 holds."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """What happens to the logits before a token is drawn; as it stands, the likeliest is taken.

    A step that is None is left out of the compiled program. A number, or an array with one value a
    row, is an argument of it: another value compiles nothing. The order is that of Hugging Face
    transformers: repetition penalty, temperature, top-k, top-p.
    """

    temperature: ArrayLike | None = None
    """Divides the logits; None or 0 takes the likeliest token."""
    top_k: ArrayLike | None = None
    """Keep the k likeliest tokens, a whole number of at least 1."""
    top_p: ArrayLike | None = None
    """Keep the fewest likeliest tokens whose probabilities reach p, in (0, 1]."""
    repetition_penalty: ArrayLike | None = None
    """Divides positive and multiplies negative logits of tokens generated before, above 0. The
    prompt does not count, as in the original, which hands its prompts over as embeddings."""

    def check(self, rows: int | None = None) -> None:
        """Raise `RequestError` for a value out of range, or an array not of one value a row.

        Traced values cannot be checked, but for their shape.
        """
        check, whole = partial(self._check, rows), f"a whole number from 1 to {MOST}"
        check("temperature", lambda x: x >= 0, "at least 0")
        check("top_k", lambda x: (x >= 1) & (x <= MOST) & (x == np.floor(x)), whole)
        check("top_p", lambda x: (0 < x) & (x <= 1), "above 0 and at most 1")
        check("repetition_penalty", lambda x: x > 0, "above 0")
        if self.temperature is None and (self.top_k is not None or self.top_p is not None):
            raise RequestError(
                "sampling: top_k and top_p need a temperature; without one the "
                "likeliest token is taken; give temperature=1.0 to sample"
            )

    def as_arrays(self) -> "Sampling":
        """The same with every number an array, so that 1 and 1.0 are one program."""
        dtypes = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
        values = (self.temperature, self.top_k, self.top_p, self.repetition_penalty)
        return Sampling(
            *(None if v is None else jnp.asarray(v, d) for v, d in zip(values, dtypes, strict=True))
        )

    def _check(
        self, rows: int | None, name: str, holds: Callable[[Any], Any], expected: str
    ) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if rows is not None and np.shape(value) not in ((), (1,), (rows,)):
            raise RequestError(
                f"sampling: {name} has shape {np.shape(value)}, expected a number or one value for"
                f" each of {rows} rows"
            )
        if not isinstance(value, Tracer) and not np.all(holds(np.asarray(value))):
            raise RequestError(f"sampling: {name} is {value}, expected {expected}")


def pick(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    seen: Bool[Array, "B V"] | None = None,
    key: Key[Array, ""] | None = None,
) -> Int[Array, "B"]:
    """Choose one token a row.

    Args:
      logits: float32.
      sampling: what to do with them.
      seen: the tokens that `repetition_penalty` applies to; None without one.
      key: None when the likeliest token is to be taken.
    """
    if sampling.repetition_penalty is not None and seen is not None:
        logits = penalise(logits, seen, _column(sampling.repetition_penalty))
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampling.temperature is None:
        return likeliest
    if key is None:
        raise RequestError("sampling with a temperature needs a key: pass jax.random.key(seed)")
    temperature = _column(sampling.temperature)
    greedy = temperature[:, 0] == 0
    logits = logits / jnp.where(temperature == 0, 1.0, temperature)
    if sampling.top_k is not None or sampling.top_p is not None:
        logits = keep_likeliest(logits, sampling.top_k, sampling.top_p)
    drawn = jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
    return jnp.where(greedy, likeliest, drawn)


def images_key(key: Key[Array, ""]) -> Key[Array, ""]:
    """The key of what is drawn while images are read; token n is drawn with `fold_in(key, n)`."""
    return jax.random.fold_in(key, 2**32 - 1)


def penalise(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "#B 1"]
) -> Float[Array, "B V"]:
    """The repetition penalty of CTRL (Keskar et al. 2019, section 4.1)."""
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, penalised, logits)


def keep_likeliest(
    logits: Float[Array, "B V"], k: ArrayLike | None = None, p: ArrayLike | None = None
) -> Float[Array, "B V"]:
    """Put all but the likeliest of a row to -inf, after one sort.

    Args:
      logits: float32.
      k: keep so many; what equals the k-th stays too.
      p: of these, keep the fewest that reach this probability among them (nucleus sampling,
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
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of what is likelier
        enough = jnp.min(jnp.where(before < _column(p), ordered, jnp.inf), axis=-1, keepdims=True)
        smallest = jnp.maximum(smallest, enough)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def _column(value: ArrayLike) -> Array:
    """A number or one value a row, as [1, 1] or [B, 1]."""
    return jnp.reshape(jnp.asarray(value, jnp.float32), (-1, 1))
