"""Generation: one compiled program that reads the prompts and then writes token after token."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from ovis_jax.errors import RequestError
from ovis_jax.inference.sampling import Sampling, images_key, pick
from ovis_jax.inputs.batch import Inputs
from ovis_jax.mesh_axes import replicated, with_automatic_axes
from ovis_jax.model.kv_cache import Cache
from ovis_jax.model.ovis import Ovis, Params

_copy, _all = with_automatic_axes(jnp.copy), with_automatic_axes(jnp.all)


class Generation(NamedTuple):
    """New tokens of each row."""

    tokens: Int[Array, "B N"]
    """Token ids, the stop id included; the pad id behind it."""
    lengths: Int[Array, "B"]
    """How many tokens of each row count, the stop id among them."""
    log_probs: Float[Array, "B N"]
    """Log-probability of each token under the model, before any sampling step; 0 at padding."""


class _State(NamedTuple):
    """What passes from one step to the next."""

    cache: Cache
    last: Int[Array, "B"]
    done: Bool[Array, "B"]
    seen: Bool[Array, "B V"] | None
    step: Int[Array, ""]


class _Request(NamedTuple):
    """What stays the same over all steps; `eos_ids` is an array so that it needs no compilation."""

    sampling: Sampling
    eos_ids: Int[Array, "stops"]
    key: Key[Array, ""] | None


def generate(
    model: Ovis,
    params: Params,
    inputs: Inputs,
    key: Key[Array, ""] | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    eos_ids: Sequence[int] | None = None,
) -> Generation:
    """Answer a batch of prompts.

    One jitted program: prefill, then a loop that ends when every row has met a stop id. Pure, so it
    may be called inside the caller's own `jax.jit`, `vmap` or mesh. It compiles once for each shape
    of `inputs`, `max_new_tokens`, and set of sampling steps in use.

    Args:
      model: static.
      params: of the model, on any device or mesh.
      inputs: from `Processor`.
      key: for sampling; may be None when greedy.
      max_new_tokens: N, static.
      sampling: greedy unless it says otherwise.
      eos_ids: stop ids; None for those of the checkpoint; an empty sequence never stops.

    Returns:
      `Generation` with tokens [B, N].

    Raises:
      RequestError: `max_new_tokens` below 1, a sampling value out of range, or sampling with no
        key.
    """
    request = _request(model, inputs, key, max_new_tokens, sampling, eos_ids)
    _, out = _begin(model, params, inputs, request, max_new_tokens, max_new_tokens)
    return replicated(out)


def stream(
    model: Ovis,
    params: Params,
    inputs: Inputs,
    key: Key[Array, ""] | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    eos_ids: Sequence[int] | None = None,
    chunk: int = 1,
) -> Iterator[Generation]:
    """Like `generate`, but yield the tokens as they come, `chunk` of them at a time.

    Each yield is a `Generation` of the new columns alone ([B, chunk]; the last one may hold fewer
    that count). While the caller looks at one, the next is already being computed, but for the
    first, which comes as soon as the prompts are read.
    """
    request = _request(model, inputs, key, max_new_tokens, sampling, eos_ids)
    if chunk < 1:
        raise RequestError(f"stream: chunk is {chunk}, expected at least 1")
    width = min(chunk, max_new_tokens)
    return _stream(model, params, inputs, request, max_new_tokens, width)


def _stream(
    model: Ovis, params: Params, inputs: Inputs, request: _Request, total: int, width: int
) -> Iterator[Generation]:
    state, piece = _begin(model, params, inputs, request, total, width)
    yield replicated(piece)  # at once: what goes on may have to be compiled first
    if width == total or all_done(state.done):
        return
    state, piece = _continue(model, params, state, request, min(width, total - width), width)
    for start in range(2 * width, total + width, width):
        done, ahead = state.done, None
        if start < total:
            done = _copy(done)  # the state itself is given away
            columns = min(width, total - start)
            state, ahead = _continue(model, params, state, request, columns, width)
        yield replicated(piece)
        if ahead is None or all_done(done):
            return
        piece = ahead


def all_done(done: Bool[Array, "B"]) -> bool:
    """Whether every row is, wherever the rows lie."""
    return bool(_all(done))


def _request(
    model: Ovis,
    inputs: Inputs,
    key: Array | None,
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: Sequence[int] | None,
) -> _Request:
    """Check what the caller asks for."""
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    if inputs.tokens.ndim != 2 or inputs.tokens.shape != inputs.positions.shape:
        raise RequestError(
            f"inputs: tokens are {inputs.tokens.shape} and positions {inputs.positions.shape}, "
            "expected [B, T] for both"
        )
    sampling.check(inputs.tokens.shape[0])
    if sampling.temperature is not None and key is None:
        raise RequestError("sampling with a temperature needs a key: pass jax.random.key(seed)")
    ids = model.config.eos_ids if eos_ids is None else tuple(eos_ids)
    return _Request(sampling.as_arrays(), jnp.asarray(ids, jnp.int32), key)


@partial(jax.jit, static_argnums=(0, 4, 5))
@with_automatic_axes
def _begin(
    model: Ovis, params: Params, inputs: Inputs, request: _Request, max_new_tokens: int, width: int
) -> tuple[_State, Generation]:
    """Read the prompts and write the first `width` tokens."""
    B, T = inputs.tokens.shape
    key = None if request.key is None else images_key(request.key)
    logits, cache = model.prefill(params, inputs, T + max_new_tokens, key)
    penalty = request.sampling.repetition_penalty is not None
    state = _State(
        cache=cache,
        last=jnp.full((B,), model.config.pad_id, jnp.int32),
        done=jnp.max(jnp.asarray(inputs.positions), axis=1) < 0,  # a row of padding
        seen=jnp.zeros(logits.shape, bool) if penalty else None,
        step=jnp.int32(0),
    )
    state, out = _choose(model, logits, state, _empty(model, B, width), request, 0)
    if width == 1:  # no loop that writes nothing: it would be half of what is compiled
        return state, out
    return _write(model, params, state, out, request, 1, width)


@partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
@with_automatic_axes
def _continue(
    model: Ovis, params: Params, state: _State, request: _Request, columns: Array, width: int
) -> tuple[_State, Generation]:
    """Write up to `columns` more tokens into a piece of `width` columns; `state` is given away."""
    out = _empty(model, state.last.shape[0], width)
    return _write(model, params, state, out, request, 0, columns)


def _write(
    model: Ovis,
    params: Params,
    state: _State,
    out: Generation,
    request: _Request,
    first: int,
    end: int | Array,
) -> tuple[_State, Generation]:
    """Fill columns `first` to `end` of `out`, or fewer when every row is done."""
    single = state.last.shape[0] == 1

    # The axis of a single row is not carried: XLA's CPU backend leaves it out of products, and what
    # is carried in one shape and multiplied in another it copies, four times a step.
    def narrow(cache: Cache) -> Cache:
        return cache._replace(blocks=jax.tree.map(lambda x: x[0] if single else x, cache.blocks))

    def widen(cache: Cache) -> Cache:
        return cache._replace(blocks=jax.tree.map(lambda x: x[None] if single else x, cache.blocks))

    def more(carry: tuple[_State, Generation, Array]) -> Array:
        state, _, column = carry
        return (column < end) & ~jnp.all(state.done)

    def step(carry: tuple[_State, Generation, Array]) -> tuple[_State, Generation, Array]:
        state, out, column = carry
        logits, cache = model.decode(params, state.last, widen(state.cache))
        state, out = _choose(model, logits, state._replace(cache=cache), out, request, column)
        return state._replace(cache=narrow(cache)), out, column + 1

    state = state._replace(cache=narrow(state.cache))
    state, out, _ = jax.lax.while_loop(more, step, (state, out, jnp.int32(first)))
    return state._replace(cache=widen(state.cache)), out


def _choose(
    model: Ovis,
    logits: Float[Array, "B V"],
    state: _State,
    out: Generation,
    request: _Request,
    column: int | Array,
) -> tuple[_State, Generation]:
    """Pick a token a row and put it down; rows that are done get the pad id."""
    key = None if request.key is None else jax.random.fold_in(request.key, state.step)
    token = pick(logits, request.sampling, state.seen, key)
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
    token = jnp.where(state.done, model.config.pad_id, token)
    out = Generation(
        out.tokens.at[:, column].set(token),
        out.lengths + ~state.done,
        out.log_probs.at[:, column].set(jnp.where(state.done, 0.0, log_prob)),
    )
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    stopped = jnp.any(token[:, None] == request.eos_ids, axis=1)
    return _State(state.cache, token, state.done | stopped, seen, state.step + 1), out


def _empty(model: Ovis, rows: int, width: int) -> Generation:
    return Generation(
        jnp.full((rows, width), model.config.pad_id, jnp.int32),
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows, width), jnp.float32),
    )
