"""Compiling ahead: everything that `generate` and `stream` need for the shapes that will come."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding
from jaxtyping import Key

from ovis_jax.errors import RequestError
from ovis_jax.inference.generate import _begin, _continue, _Request, _request, _State, all_done
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.batch import Inputs
from ovis_jax.inputs.buckets import Bucket
from ovis_jax.model.ovis import Ovis, Params


class Warm(NamedTuple):
    """What was compiled."""

    bucket: Bucket
    seconds: float
    """What tracing and compiling took; less where JAX's persistent cache had the programs."""


def warmup(
    model: Ovis,
    params: Params,
    buckets: Sequence[tuple[int, ...]],
    key: Key[Array, ""] | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    eos_ids: Sequence[int] | None = None,
    chunk: int | None = None,
    sharding: Sharding | None = None,
) -> list[Warm]:
    """Compile what requests of some shapes need, without running the model.

    Afterwards `generate` compiles nothing for inputs of these shapes, nor does `stream` if `chunk`
    was given, as long as the other arguments are of the same kind: `max_new_tokens`, which sampling
    steps are None, how many stop ids, whether there is a key. Their values do not matter.

    Args:
      model: as `generate` gets it.
      params: the parameters that will be used: where they lie is part of the program.
      buckets: the shapes, each a `Bucket` (rows, length, crops). Give the processor the same ones
        (`Processor.buckets`), and every batch has one of them.
      key: some key if requests will have one; None if not.
      max_new_tokens: N.
      sampling: what `generate` will get.
      eos_ids: what `generate` will get.
      chunk: what `stream` will get; None if it is not used.
      sharding: where the inputs will lie; None for numpy arrays, as they come from the processor.

    Returns:
      One `Warm` a bucket, in order.

    Raises:
      RequestError: there is no bucket, or one that no batch of this model can have, or what
        `generate` and `stream` would raise. Nothing has been compiled then.
    """
    if not buckets:
        raise RequestError("warmup: there is no bucket; give at least one, such as (1, 512, 1)")
    shapes = []
    for n, given in enumerate(buckets):
        if not isinstance(given, tuple) or not 2 <= len(given) <= 3:
            raise RequestError(
                f"warmup: buckets[{n}] is {given!r}, expected a Bucket (rows, length, crops)"
            )
        shapes.append(Bucket(*given))
        shapes[-1].check(model.config)
    if chunk is not None and chunk < 1:
        raise RequestError(f"stream: chunk is {chunk}, expected at least 1")
    placed = sharding is not None or any(
        getattr(x, "committed", False) for x in jax.tree.leaves(params)
    )
    found = []
    for shape in shapes:
        start = time.perf_counter()
        inputs = _inputs(model, shape, sharding)
        request = _request(model, inputs, key, max_new_tokens, sampling, eos_ids)
        _begin.lower(model, params, inputs, request, max_new_tokens, max_new_tokens).compile()
        if chunk is not None:
            width = min(chunk, max_new_tokens)
            _stream(model, params, inputs, request, max_new_tokens, width, placed)
        found.append(Warm(shape, time.perf_counter() - start))
    return found


def _inputs(model: Ovis, shape: Bucket, sharding: Sharding | None) -> Any:
    """The shapes of a batch."""
    vision = model.config.vision
    pixels = (shape.crops, vision.image_size, vision.image_size, vision.num_channels)
    shapes = [((shape.rows, shape.length), np.int32)] * 2 + [(pixels, np.float32)]
    return Inputs(*(jax.ShapeDtypeStruct(*x, sharding=sharding) for x in shapes))  # pyright: ignore


def _stream(
    model: Ovis, params: Params, inputs: Inputs, request: _Request, total: int, width: int, placed
) -> None:
    """Compile the first chunk, those that follow it, and the question whether all is done."""
    begin = _begin.lower(model, params, inputs, request, total, width)
    shardings = begin.compile().output_shardings[0]
    state = _laid(begin.out_info[0], shardings, placed)
    _ask(state)
    for _ in range(3 if width < total else 0):
        step = _continue.lower(model, params, state, request, 1, width)
        again = _laid(step.out_info[0], step.compile().output_shardings[0], placed)
        _ask(again)
        if again == state:
            return
        # On a mesh a step may lay its state otherwise than it got it: one more program.
        state = again


def _laid(state: Any, shardings: Any, placed: bool) -> Any:
    """The shapes of a state that lies as a program leaves it."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s if placed else None),
        state,
        shardings,
    )


def _ask(state: _State) -> None:
    done = state.done
    zeros = jnp.zeros(done.shape, done.dtype)
    all_done(jnp.copy(zeros if done.sharding is None else jax.device_put(zeros, done.sharding)))
