"""Generation: one compiled program that reads the prompts and then generates token by token."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from ovis_jax.api_type_checks import check_argument_types
from ovis_jax.errors import RequestError
from ovis_jax.inference.sampling import Sampling, derive_image_key, sample
from ovis_jax.inputs.batch import Inputs
from ovis_jax.mesh import replicate_if_explicit, run_with_automatic_axes
from ovis_jax.model.cpu import squeeze_single_row, unsqueeze_single_row
from ovis_jax.model.kv_cache import Cache
from ovis_jax.model.ovis import Ovis, Params

_copy, _all = run_with_automatic_axes(jnp.copy), run_with_automatic_axes(jnp.all)


class Generation(NamedTuple):
    """Generated tokens of each row."""

    tokens: Int[Array, "B n"]
    """Token ids, including the stop id; the pad id after it."""
    lengths: Int[Array, "B"]
    """Number of tokens in each row, including the stop id."""
    log_probs: Float[Array, "B n"]
    """Log-probability of each token under the model, before any sampling step; 0 at padding."""


class GenerationState(NamedTuple):
    """The state between two decode steps."""

    cache: Cache
    last_tokens: Int[Array, "B"]
    done: Bool[Array, "B"]
    seen: Bool[Array, "B V"] | None
    step: Int[Array, ""]


class GenerationOptions(NamedTuple):
    """What all steps share. `eos_ids` is an array so that other stop ids compile nothing."""

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

    This is one jitted program: prefill, then a loop that ends when every row has a stop id. It is
    pure, so you may call it in your own `jax.jit`, `vmap` or mesh. It compiles once for each shape
    of `inputs`, each `max_new_tokens` and each set of sampling steps.

    Args:
      model: The model; static.
      params: The model's parameters, on any device or mesh.
      inputs: The prompts, from `Processor`.
      key: Random key for sampling; may be None if decoding is greedy.
      max_new_tokens: Maximum number n of tokens per row; static.
      sampling: Sampling options; greedy by default.
      eos_ids: Stop ids; None for the checkpoint's own, an empty sequence for none.

    Returns:
      `Generation` with tokens int32 [B, n].

    Raises:
      RequestError: `max_new_tokens` is below 1, a sampling value is out of range, or there is a
        temperature but no key.
      TypeError: An argument has another type.
    """
    check_argument_types(
        "generate",
        model=(model, Ovis),
        params=(params, Mapping),
        inputs=(inputs, Inputs),
        max_new_tokens=(max_new_tokens, Integral),
        sampling=(sampling, Sampling),
    )
    options = make_options(model, inputs, key, max_new_tokens, sampling, eos_ids)
    _, out = prefill_and_decode(model, params, inputs, options, max_new_tokens, max_new_tokens)
    return replicate_if_explicit(out)


def stream(
    model: Ovis,
    params: Params,
    inputs: Inputs,
    key: Key[Array, ""] | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    eos_ids: Sequence[int] | None = None,
    chunk_size: int = 1,
) -> Iterator[Generation]:
    """Generate like `generate`, but yield the tokens in chunks.

    The first chunk comes as soon as the prompts are read. While the caller handles a later one, the
    next is already being computed.

    Args:
      model: As in `generate`.
      params: As in `generate`.
      inputs: As in `generate`.
      key: As in `generate`.
      max_new_tokens: As in `generate`.
      sampling: As in `generate`.
      eos_ids: As in `generate`.
      chunk_size: Number of tokens per row in a chunk; static.

    Yields:
      A `Generation` with only the new tokens, int32 [B, chunk_size].

    Raises:
      RequestError: `chunk_size` is below 1, or as in `generate`.
      TypeError: As in `generate`.
    """
    check_argument_types(
        "stream",
        model=(model, Ovis),
        params=(params, Mapping),
        inputs=(inputs, Inputs),
        max_new_tokens=(max_new_tokens, Integral),
        sampling=(sampling, Sampling),
    )
    options = make_options(model, inputs, key, max_new_tokens, sampling, eos_ids)
    if chunk_size < 1:
        raise RequestError(f"stream: chunk_size is {chunk_size}, expected at least 1")
    width = min(chunk_size, max_new_tokens)
    return _stream_chunks(model, params, inputs, options, max_new_tokens, width)


def _stream_chunks(
    model: Ovis,
    params: Params,
    inputs: Inputs,
    options: GenerationOptions,
    max_new_tokens: int,
    width: int,
) -> Iterator[Generation]:
    state, chunk = prefill_and_decode(model, params, inputs, options, max_new_tokens, width)
    yield replicate_if_explicit(chunk)  # at once: the next program may have to be compiled
    if width == max_new_tokens or all_done(state.done):
        return
    columns = min(width, max_new_tokens - width)
    state, chunk = decode_more(model, params, state, options, columns, width)
    for start in range(2 * width, max_new_tokens + width, width):
        done, next_chunk = state.done, None
        if start < max_new_tokens:
            done = _copy(done)  # the state itself is donated
            columns = min(width, max_new_tokens - start)
            state, next_chunk = decode_more(model, params, state, options, columns, width)
        yield replicate_if_explicit(chunk)
        if next_chunk is None or all_done(done):
            return
        chunk = next_chunk


def all_done(done: Bool[Array, "B"]) -> bool:
    """Whether every row is done, whatever the sharding of the rows."""
    return bool(_all(done))


def make_options(
    model: Ovis,
    inputs: Inputs,
    key: Array | None,
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: Sequence[int] | None,
) -> GenerationOptions:
    """Check the arguments of `generate`, and convert them to arrays.

    Raises:
      RequestError: As in `generate`, or the inputs are not a batch.
    """
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
    return GenerationOptions(sampling.as_arrays(), jnp.asarray(ids, jnp.int32), key)


@partial(jax.jit, static_argnums=(0, 4, 5))
@run_with_automatic_axes
def prefill_and_decode(
    model: Ovis,
    params: Params,
    inputs: Inputs,
    options: GenerationOptions,
    max_new_tokens: int,
    width: int,
) -> tuple[GenerationState, Generation]:
    """Read the prompts and generate the first `width` tokens."""
    B, T = inputs.tokens.shape
    key = None if options.key is None else derive_image_key(options.key)
    logits, cache = model.prefill(params, inputs, T + max_new_tokens, key)
    has_penalty = options.sampling.repetition_penalty is not None
    state = GenerationState(
        cache=cache,
        last_tokens=jnp.full((B,), model.config.pad_id, jnp.int32),
        done=jnp.max(jnp.asarray(inputs.positions), axis=1) < 0,  # rows that are only padding
        seen=jnp.zeros(logits.shape, bool) if has_penalty else None,
        step=jnp.int32(0),
    )
    state, out = _append_token(model, logits, state, _empty(model, B, width), options, 0)
    if width == 1:  # a loop without iterations would double the compile time
        return state, out
    return _decode_loop(model, params, state, out, options, 1, width)


@partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
@run_with_automatic_axes
def decode_more(
    model: Ovis,
    params: Params,
    state: GenerationState,
    options: GenerationOptions,
    columns: Array,
    width: int,
) -> tuple[GenerationState, Generation]:
    """Generate up to `columns` more tokens per row, padded to `width` columns; donates `state`."""
    out = _empty(model, state.last_tokens.shape[0], width)
    return _decode_loop(model, params, state, out, options, 0, columns)


def _decode_loop(
    model: Ovis,
    params: Params,
    state: GenerationState,
    out: Generation,
    options: GenerationOptions,
    first: int,
    end: int | Array,
) -> tuple[GenerationState, Generation]:
    """Fill the columns from `first` up to `end` of `out`, or fewer if every row is done."""

    def more(carry: tuple[GenerationState, Generation, Array]) -> Array:
        state, _, column = carry
        return (column < end) & ~jnp.all(state.done)

    def step(
        carry: tuple[GenerationState, Generation, Array],
    ) -> tuple[GenerationState, Generation, Array]:
        state, out, column = carry
        cache = unsqueeze_single_row(state.cache)
        logits, cache = model.decode(params, state.last_tokens, cache)
        state = state._replace(cache=squeeze_single_row(cache))
        state, out = _append_token(model, logits, state, out, options, column)
        return state, out, column + 1

    state = state._replace(cache=squeeze_single_row(state.cache))
    state, out, _ = jax.lax.while_loop(more, step, (state, out, jnp.int32(first)))
    return state._replace(cache=unsqueeze_single_row(state.cache)), out


def _append_token(
    model: Ovis,
    logits: Float[Array, "B V"],
    state: GenerationState,
    out: Generation,
    options: GenerationOptions,
    column: int | Array,
) -> tuple[GenerationState, Generation]:
    """Sample one token per row into a column of `out`; rows that are done get the pad id."""
    key = None if options.key is None else jax.random.fold_in(options.key, state.step)
    token = sample(logits, options.sampling, state.seen, key)
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
    stopped = jnp.any(token[:, None] == options.eos_ids, axis=1)
    return GenerationState(state.cache, token, state.done | stopped, seen, state.step + 1), out


def _empty(model: Ovis, rows: int, width: int) -> Generation:
    return Generation(
        jnp.full((rows, width), model.config.pad_id, jnp.int32),
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows, width), jnp.float32),
    )
