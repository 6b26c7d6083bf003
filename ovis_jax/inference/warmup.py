"""Compiling the programs of `generate` and `stream` ahead of time, for given batch shapes."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding
from jaxtyping import Key

from ovis_jax.argument_type_checks import check_argument_types
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
    """A bucket whose programs have been compiled."""

    bucket: Bucket
    seconds: float
    """Time for tracing and compiling; shorter if the programs are in JAX's persistent cache."""


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
    """Compile the programs for batches with given shapes, without running the model.

    Afterwards, `generate` compiles nothing for inputs with these shapes. The same holds for
    `stream` if `chunk_size` was given. These later calls must have the same `max_new_tokens` and
    the same number of stop ids, set the same sampling parameters, and pass a key if and only if
    `warmup` was given one. The values of the sampling parameters, the stop ids and the key do not
    matter.

    Args:
      model: The model, as in `generate`.
      params: The parameters that will be used later; their sharding is part of the program.
      buckets: The shapes, each a `Bucket` (rows, length, crops). If the processor has the same
        buckets (`Processor.buckets`), every batch has one of these shapes.
      key: Any random key if the later calls will have a key, otherwise None.
      max_new_tokens: The maximum number of tokens per row, as in `generate`.
      sampling: The sampling parameters, as in `generate`.
      eos_ids: The stop ids, as in `generate`.
      chunk_size: The chunk size, as in `stream`; None if `stream` will not be used.
      sharding: Sharding of the inputs; None for numpy arrays, which the processor returns.

    Returns:
      One `CompiledBucket` per bucket, in order.

    Raises:
      RequestError: There is no bucket, a bucket's shape is impossible for this model, or an option
        is invalid, as in `generate` and `stream`. Nothing is compiled in these cases.
      TypeError: `model` or `params` has the wrong type.
    """
    check_argument_types("warmup", model=(model, Ovis), params=(params, Mapping))
    if not buckets:
        raise RequestError("warmup: there is no bucket; pass at least one, such as (1, 512, 1)")
    batches = []
    for n, given in enumerate(buckets):
        if not isinstance(given, tuple) or not 2 <= len(given) <= 3:
            raise RequestError(
                f"warmup: buckets[{n}] is {given!r}, expected a Bucket (rows, length, crops)"
            )
        bucket = Bucket(*given)
        bucket.check(model.config)
        inputs = _abstract_inputs(model, bucket, sharding)
        options = make_options(
            "warmup", model, params, inputs, key, max_new_tokens, sampling, eos_ids, chunk_size
        )
        batches.append((bucket, inputs, options))
    committed = sharding is not None or any(
        getattr(x, "committed", False) for x in jax.tree.leaves(params)
    )
    compiled = []
    for bucket, inputs, options in batches:
        start = time.perf_counter()
        arguments = model, params, inputs, options, max_new_tokens
        prefill_and_decode.lower(*arguments, max_new_tokens).compile()
        if chunk_size is not None:
            _compile_stream(*arguments, min(chunk_size, max_new_tokens), committed)
        compiled.append(CompiledBucket(bucket, time.perf_counter() - start))
    return compiled


def _abstract_inputs(model: Ovis, bucket: Bucket, sharding: Sharding | None) -> Any:
    """Return the inputs for a bucket as abstract arrays."""
    vision = model.config.vision
    pixels = (bucket.crops, vision.image_size, vision.image_size, vision.num_channels)
    shapes = [((bucket.rows, bucket.length), np.int32)] * 2 + [(pixels, np.float32)]
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
    """Compile the programs for the first chunk, for later chunks, and for `all_done`."""
    first = prefill_and_decode.lower(model, params, inputs, options, max_new_tokens, width)
    state = _abstract_state(first.out_info[0], first.compile().output_shardings[0], committed)
    _compile_all_done(state)
    columns = jax.device_put(np.int32(1))
    for _ in range(3 if width < max_new_tokens else 0):
        later = decode_more.lower(model, params, state, options, columns, width)
        shardings = later.compile().output_shardings[0]
        next_state = _abstract_state(later.out_info[0], shardings, committed)
        _compile_all_done(next_state)
        if next_state == state:
            return
        # On a mesh, the sharding of the state may change in the first chunks, which needs one more
        # program.
        state = next_state


def _abstract_state(state: Any, shardings: Any, committed: bool) -> Any:
    """Return a state as abstract arrays with the shardings that a program outputs."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s if committed else None),
        state,
        shardings,
    )


def _compile_all_done(state: GenerationState) -> None:
    done = state.done
    zeros = jnp.zeros(done.shape, done.dtype)
    all_done(jnp.copy(zeros if done.sharding is None else jax.device_put(zeros, done.sharding)))
