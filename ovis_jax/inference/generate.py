"""Generation in one compiled program: prefill, then decoding token by token."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from ovis_jax.argument_type_checks import check_argument_types
from ovis_jax.errors import RequestError
from ovis_jax.inference.sampling import Sampling, derive_image_key, sample
from ovis_jax.inputs.batch import Inputs
from ovis_jax.mesh import replicate_if_explicit, run_with_automatic_axes
from ovis_jax.model.cpu import squeeze_single_row, unsqueeze_single_row
from ovis_jax.model.kv_cache import Cache
from ovis_jax.model.ovis import Ovis, Params

_copy, _all = run_with_automatic_axes(jnp.copy), run_with_automatic_axes(jnp.all)


class Generation(NamedTuple):
    """The tokens generated for each row of a batch."""

    tokens: Int[Array, "B n"]
    """Token ids up to and including the stop id, followed by pad ids."""
    lengths: Int[Array, "B"]
    """Number of tokens in each row, including the stop id."""
    log_probs: Float[Array, "B n"]
    """Log-probability of each token, before sampling parameters are applied; 0 at padding."""


class GenerationState(NamedTuple):
    """The state that is carried from one decode step to the next."""

    cache: Cache
    last_tokens: Int[Array, "B"]
    done: Bool[Array, "B"]
    counts: Int[Array, "B V"] | None
    """How often each token was generated in each row; None if there is no penalty."""
    step: Int[Array, ""]


class GenerationOptions(NamedTuple):
    """Options of all steps. Stop ids are an array, so changing them causes no recompilation."""

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
    """Generate answers to a batch of prompts.

    This is one jitted program: prefill, then a loop that ends when every row has a stop id. The
    function is pure, so it can be called inside `jax.jit` or `jax.vmap`, or under a mesh. It is
    compiled once for each shape of `inputs`, each `max_new_tokens`, and each combination of
    sampling parameters that are set.

    Args:
      model: The model; static.
      params: Parameters of the model, on any device or mesh.
      inputs: The prompts, from `Processor`.
      key: Random key for sampling; it may be None if decoding is greedy.
      max_new_tokens: Maximum number of tokens per row, n; static.
      sampling: Sampling parameters; decoding is greedy by default.
      eos_ids: Stop ids; None for the checkpoint's stop ids, an empty sequence for no stop ids.

    Returns:
      A `Generation` with tokens int32 [B, n].

    Raises:
      RequestError: `max_new_tokens` is below 1, a sampling parameter is out of range, or a
        temperature is given without a key.
      TypeError: An argument has the wrong type.
    """
    options = make_options(
        "generate", model, params, inputs, key, max_new_tokens, sampling, eos_ids
    )
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
    """Generate answers like `generate`, but yield the tokens in chunks.

    The first chunk is available right after prefill. While the caller processes a later chunk, the
    next one is already being computed.

    Args:
      model: The model, as in `generate`.
      params: The parameters, as in `generate`.
      inputs: The prompts, as in `generate`.
      key: The random key, as in `generate`.
      max_new_tokens: The maximum number of tokens per row, as in `generate`.
      sampling: The sampling parameters, as in `generate`.
      eos_ids: The stop ids, as in `generate`.
      chunk_size: Number of tokens per row in each chunk; static.

    Yields:
      A `Generation` with only the new tokens, whose shape is [B, chunk_size].

    Raises:
      RequestError: `chunk_size` is below 1, or `generate` would raise this error.
      TypeError: An argument has the wrong type.
    """
    options = make_options(
        "stream", model, params, inputs, key, max_new_tokens, sampling, eos_ids, chunk_size
    )
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
    yield replicate_if_explicit(chunk)  # at once, because the next program may have to be compiled
    if width == max_new_tokens or all_done(state.done):
        return

    def decode_columns(state: GenerationState, start: int) -> tuple[GenerationState, Generation]:
        columns = jax.device_put(np.int32(min(width, max_new_tokens - start)))
        return decode_more(model, params, state, options, columns, width)

    state, chunk = decode_columns(state, width)
    for start in range(2 * width, max_new_tokens + width, width):
        done, next_chunk = state.done, None
        if start < max_new_tokens:
            done = _copy(done)  # a copy, because the state is donated
            state, next_chunk = decode_columns(state, start)
        yield replicate_if_explicit(chunk)
        if next_chunk is None or all_done(done):
            return
        chunk = next_chunk


def all_done(done: Bool[Array, "B"]) -> bool:
    """Return whether every row is done, for any sharding of the rows."""
    return bool(jax.device_get(_all(done)))


def make_options(
    function: str,
    model: Ovis,
    params: Params,
    inputs: Inputs,
    key: Array | None,
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: Sequence[int] | None,
    chunk_size: int | None = None,
) -> GenerationOptions:
    """Check the arguments of `generate`, and convert the sampling parameters to arrays.

    Error messages begin with `function`, the name of the function that the user called: "generate",
    "stream" or "warmup".

    Raises:
      RequestError: The inputs are not a batch, or an option is invalid, as in `generate`.
      TypeError: An argument has the wrong type, or `key` is not a single random key.
    """
    check_argument_types(
        function,
        model=(model, Ovis),
        params=(params, Mapping),
        inputs=(inputs, Inputs),
        max_new_tokens=(max_new_tokens, Integral),
        sampling=(sampling, Sampling),
        eos_ids=(eos_ids, Iterable | None),
        chunk_size=(chunk_size, Integral | None),
    )
    if key is not None:
        try:  # JAX also accepts legacy keys, which are uint32 arrays
            jax.eval_shape(jax.random.fold_in, key, 0)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{function}: key has type {type(key).__name__} and shape {list(jnp.shape(key))},"
                " expected one random key, such as jax.random.key(0)"
            ) from error
    for name, number in (("max_new_tokens", max_new_tokens), ("chunk_size", chunk_size)):
        if number is not None and number < 1:
            raise RequestError(f"{function}: {name} is {number}, expected at least 1")
    if inputs.tokens.ndim != 2 or inputs.tokens.shape != inputs.positions.shape:
        raise RequestError(
            f"inputs: tokens are {inputs.tokens.shape} and positions {inputs.positions.shape}, "
            "expected [B, T] for both"
        )
    sampling.check(inputs.tokens.shape[0])
    if sampling.temperature is not None and key is None:
        raise RequestError("sampling with a temperature needs a key: pass jax.random.key(seed)")
    ids = model.config.eos_ids if eos_ids is None else tuple(eos_ids)
    return GenerationOptions(sampling.as_arrays(), jax.device_put(np.asarray(ids, np.int32)), key)


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
    """Prefill the prompts and generate the first `width` tokens."""
    B, T = inputs.tokens.shape
    key = None if options.key is None else derive_image_key(options.key)
    logits, cache = model.prefill(params, inputs, T + max_new_tokens, key)
    state = GenerationState(
        cache=cache,
        last_tokens=jnp.full((B,), model.config.pad_id, jnp.int32),
        done=jnp.max(jnp.asarray(inputs.positions), axis=1) < 0,  # rows that contain only padding
        counts=jnp.zeros(logits.shape, jnp.int32) if options.sampling.needs_counts else None,
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
    columns: Int[Array, ""],
    width: int,
) -> tuple[GenerationState, Generation]:
    """Generate up to `columns` more tokens per row, padded to `width`; `state` is donated."""
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
    """Fill columns `first` to `end` - 1 of `out`; stop early when every row is done."""

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
    """Sample one token per row into a column of `out`; finished rows get the pad id."""
    key = None if options.key is None else jax.random.fold_in(options.key, state.step)
    token = sample(logits, options.sampling, state.counts, key)
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
    token = jnp.where(state.done, model.config.pad_id, token)
    out = Generation(
        out.tokens.at[:, column].set(token),
        out.lengths + (~state.done).astype(jnp.int32),
        out.log_probs.at[:, column].set(jnp.where(state.done, 0.0, log_prob)),
    )
    counts = state.counts
    if counts is not None:
        counts = counts.at[jnp.arange(token.shape[0]), token].add(1)
    stopped = jnp.any(token[:, None] == options.eos_ids[None], axis=1)
    return GenerationState(state.cache, token, state.done | stopped, counts, state.step + 1), out


def _empty(model: Ovis, rows: int, width: int) -> Generation:
    return Generation(
        jnp.full((rows, width), model.config.pad_id, jnp.int32),
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows, width), jnp.float32),
    )
