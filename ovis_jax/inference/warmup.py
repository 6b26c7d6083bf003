"""Compiling ahead of time what `generate` and `stream` need for given batch shapes."""

import time
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding
from jaxtyping import Key

from ovis_jax.api_type_checks import check_argument_types
from ovis_jax.errors import RequestError
from ovis_jax.inference.generate import (
    GenerationOptions,
    GenerationState,
    all_done,
    decode_more,
    make_options,
    prefill_and_decode,
)
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.batch import Inputs
from ovis_jax.inputs.buckets import Bucket
from ovis_jax.model.ovis import Ovis, Params


class CompiledBucket(NamedTuple):
    """A bucket whose programs are compiled."""

    bucket: Bucket
    seconds: float
    """Time for tracing and compiling; shorter if JAX's persistent cache had the programs."""


def warmup(
    model: Ovis,
    params: Params,
    buckets: Sequence[tuple[int, ...]],
    key: Key[Array, ""] | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    eos_ids: Sequence[int] | None = None,
    chunk_size: int | None = None,
    sharding: Sharding | None = None,
) -> list[CompiledBucket]:
    """Compile the programs for batches of given shapes, without running the model.

    Afterwards `generate` compiles nothing for inputs of these shapes, and neither does `stream` if
    `chunk_size` was given. The other arguments must be of the same kind: the same `max_new_tokens`,
    the same sampling steps that are None, as many stop ids, and a key or none. Their values do not
    matter.

    Args:
      model: As in `generate`.
      params: The parameters that will be used, because their sharding is part of the program.
      buckets: The shapes, each a `Bucket` (rows, length, crops). If the processor has the same
        buckets (`Processor.buckets`), every batch has one of these shapes.
      key: Any key if the requests will have one, else None.
      max_new_tokens: As in `generate`.
      sampling: As in `generate`.
      eos_ids: As in `generate`.
      chunk_size: As in `stream`; None if `stream` is not used.
      sharding: Sharding of the inputs; None for numpy arrays, as the processor makes them.

    Returns:
      One `CompiledBucket` per bucket, in order.

    Raises:
      RequestError: There is no bucket, no batch of this model can have a bucket's shape, or
        `generate` or `stream` would raise it. Nothing is compiled then.
      TypeError: `model` or `params` has another type.
    """
    check_argument_types(
        "warmup",
        model=(model, Ovis),
        params=(params, Mapping),
        max_new_tokens=(max_new_tokens, Integral),
        sampling=(sampling, Sampling),
    )
    if not buckets:
        raise RequestError("warmup: there is no bucket; pass at least one, such as (1, 512, 1)")
    shapes = []
    for n, given in enumerate(buckets):
        if not isinstance(given, tuple) or not 2 <= len(given) <= 3:
            raise RequestError(
                f"warmup: buckets[{n}] is {given!r}, expected a Bucket (rows, length, crops)"
            )
        shapes.append(Bucket(*given))
        shapes[-1].check(model.config)
    if chunk_size is not None and chunk_size < 1:
        raise RequestError(f"warmup: chunk_size is {chunk_size}, expected at least 1")
    committed = sharding is not None or any(
        getattr(x, "committed", False) for x in jax.tree.leaves(params)
    )
    compiled = []
    for shape in shapes:
        start = time.perf_counter()
        inputs = _abstract_inputs(model, shape, sharding)
        options = make_options(model, inputs, key, max_new_tokens, sampling, eos_ids)
        arguments = model, params, inputs, options, max_new_tokens
        prefill_and_decode.lower(*arguments, max_new_tokens).compile()
        if chunk_size is not None:
            _compile_stream(*arguments, min(chunk_size, max_new_tokens), committed)
        compiled.append(CompiledBucket(shape, time.perf_counter() - start))
    return compiled


def _abstract_inputs(model: Ovis, shape: Bucket, sharding: Sharding | None) -> Any:
    """Return the inputs of a bucket as shapes without values."""
    vision = model.config.vision
    pixels = (shape.crops, vision.image_size, vision.image_size, vision.num_channels)
    shapes = [((shape.rows, shape.length), np.int32)] * 2 + [(pixels, np.float32)]
    return Inputs(*(jax.ShapeDtypeStruct(*x, sharding=sharding) for x in shapes))  # pyright: ignore


def _compile_stream(
    model: Ovis,
    params: Params,
    inputs: Inputs,
    options: GenerationOptions,
    max_new_tokens: int,
    width: int,
    committed: bool,
) -> None:
    """Compile the first chunk, the later chunks, and the check whether all rows are done."""
    first = prefill_and_decode.lower(model, params, inputs, options, max_new_tokens, width)
    state = _abstract_state(first.out_info[0], first.compile().output_shardings[0], committed)
    _compile_all_done(state)
    for _ in range(3 if width < max_new_tokens else 0):
        later = decode_more.lower(model, params, state, options, 1, width)
        shardings = later.compile().output_shardings[0]
        next_state = _abstract_state(later.out_info[0], shardings, committed)
        _compile_all_done(next_state)
        if next_state == state:
            return
        # On a mesh the sharding of the state may change in the first chunks: one more program.
        state = next_state


def _abstract_state(state: Any, shardings: Any, committed: bool) -> Any:
    """Return a state as shapes with the shardings that a program gives it."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s if committed else None),
        state,
        shardings,
    )


def _compile_all_done(state: GenerationState) -> None:
    done = state.done
    zeros = jnp.zeros(done.shape, done.dtype)
    all_done(jnp.copy(zeros if done.sharding is None else jax.device_put(zeros, done.sharding)))
