"""Functions of the logits at labels, without logits at every position in memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ovis_jax.inputs.conversation import IGNORE_INDEX
from ovis_jax.model.decoder import unembed
from ovis_jax.model.layers import over_last_axis
from ovis_jax.model.ovis import Ovis, Params
from ovis_jax.sharding import constrain, size_per_device

LOGITS_PER_CHUNK = 2**27
"""Maximum number of logits that a device computes at a time. In float32, they take 512 MiB, and
several copies exist at once."""

LabelFunction = Callable[[Float[Array, "B t V"], Int[Array, "B t"]], Any]
"""A function of logits and labels that returns arrays [B, t], which are zero for label -100."""


def label_log_probs(
    logits: Float[Array, "*rows V"], labels: Int[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """Compute the log-probability of one label per distribution; the result is 0 for label -100."""
    # The label is selected by comparison, so that logits that are sharded over V are not gathered.
    logits -= jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    is_label = labels[..., None] == over_last_axis(jnp.arange(logits.shape[-1]), logits)
    log_probs = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    log_probs -= jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
    return jnp.where(labels != IGNORE_INDEX, log_probs, 0.0)


def map_label_logits(
    function: LabelFunction,
    model: Ovis,
    params: Params,
    hidden: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
) -> Any:
    """Apply a function to the logits at the positions that have a label, in chunks.

    If the logits of all positions exceed `LOGITS_PER_CHUNK`, the positions with a label are moved
    to the front of their row, and the rows are divided into chunks of t positions. Only chunks with
    a label are computed. The backward pass computes their logits again. In this case, the result
    supports reverse-mode differentiation, but neither forward mode nor a second derivative.

    Args:
      function: The function.
      model: The model.
      params: Parameters of the complete model.
      hidden: Output of the last decoder block, from `Ovis.last_hidden_states`.
      labels: For each position, the token id whose logit is needed, or -100.

    Returns:
      The function's arrays for all positions, [B, T].
    """
    config = model.config.decoder
    leaves, structure = jax.tree.flatten(model.unembed_weights(params))

    def apply(leaves: list[Array], x: Float[Array, "B t D"], labels: Int[Array, "B t"]) -> Any:
        logits = unembed(config, constrain(x, "B T D"), *structure.unflatten(leaves))
        return function(constrain(logits, "B T V"), labels)

    B, T = labels.shape
    per_position = size_per_device("B", B, hidden) * size_per_device("V", config.vocab_size, hidden)
    chunks = min(-(T * per_position // -LOGITS_PER_CHUNK), T)
    if chunks <= 1:
        return apply(leaves, hidden, labels)
    t = -(T // -chunks)
    padding = (0, 0), (0, chunks * t - T)
    hidden = jnp.pad(hidden, (*padding, (0, 0)))
    labels = jnp.pad(labels, padding, constant_values=IGNORE_INDEX)
    has_label = labels != IGNORE_INDEX
    order = jnp.argsort(~has_label, axis=1)  # stable
    num_labels = jnp.max(jnp.sum(has_label, axis=1, dtype=jnp.int32))

    def divide(x: Array) -> Array:  # [B, T, ...] to [chunks, B, t, ...]
        return _permute(x, order).reshape(B, chunks, t, *x.shape[2:]).swapaxes(0, 1)

    def join(x: Array) -> Array:  # [chunks, B, t] to [B, T]
        return _permute(x.swapaxes(0, 1).reshape(B, -1), jnp.argsort(order, axis=1))[:, :T]

    out = _map_chunks(apply, leaves, divide(hidden), divide(labels), -(num_labels // -t))
    return jax.tree.map(join, out)


@jax.vmap
def _permute(x: Array, order: Int[Array, "T"]) -> Array:
    # The indices are unique, so that the gradient needs no sum.
    return x.at[order].get(mode="promise_in_bounds", unique_indices=True)


_Apply = Callable[[list[Array], Float[Array, "B t D"], Int[Array, "B t"]], Any]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _map_chunks(
    apply: _Apply,
    weights: list[Array],
    hidden: Float[Array, "chunks B t D"],
    labels: Int[Array, "chunks B t"],
    num_chunks: Int[Array, ""],
) -> Any:
    """Apply a function to the first chunks; the results of the other chunks are zero.

    The derivative is written by hand, because `jax.lax.scan` with `jax.checkpoint` would compute
    all chunks, or copy the weights as residuals of a `jax.lax.cond` in every chunk. It also sums
    the gradient of the weights over the chunks in float32, for every dtype.
    """

    def step(i: Array, out: Any) -> Any:
        new = apply(weights, hidden[i], labels[i])
        return jax.tree.map(lambda x, y: x.at[i].set(y), out, new)

    shapes = jax.eval_shape(apply, weights, hidden[0], labels[0])
    out = jax.tree.map(lambda x: jnp.zeros((len(hidden), *x.shape), x.dtype), shapes)
    return jax.lax.fori_loop(0, num_chunks, step, out)


def _map_chunks_forward(apply: _Apply, *arguments: Any) -> tuple[Any, Any]:
    return _map_chunks(apply, *arguments), arguments


def _map_chunks_backward(apply: _Apply, arguments: Any, gradients: Any) -> tuple[Any, ...]:
    weights, hidden, labels, num_chunks = arguments
    floats = {i: w for i, w in enumerate(weights) if jnp.issubdtype(w.dtype, jnp.floating)}

    def step(i: Array, sums: tuple[dict[int, Array], Array]) -> tuple[dict[int, Array], Array]:
        def apply_to_chunk(floats: dict[int, Array], x: Array) -> Any:
            return apply(
                [floats[n] if n in floats else w for n, w in enumerate(weights)], x, labels[i]
            )

        transpose = jax.vjp(apply_to_chunk, floats, hidden[i])[1]
        d_floats, d_hidden = transpose(jax.tree.map(lambda x: x[i], gradients))
        totals = jax.tree.map(lambda x, y: x + y.astype(jnp.float32), sums[0], d_floats)
        return totals, sums[1].at[i].set(d_hidden)

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), floats)
    sums = jax.lax.fori_loop(0, num_chunks, step, (zeros, jnp.zeros_like(hidden)))
    d_weights = [sums[0][n].astype(w.dtype) if n in floats else None for n, w in enumerate(weights)]
    return d_weights, sums[1], None, None


_map_chunks.defvjp(_map_chunks_forward, _map_chunks_backward)
