"""The programs of the engine, and programs with unmerged adapters, compiled without devices."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import AbstractMesh, Mesh

from ovis_jax.engine.runner import abstract_state, cache_lengths, state_shardings
from ovis_jax.engine.state import (
    DecodeState,
    copy_cache,
    decode,
    encode_crops,
    init_visual,
    make_sampling_params,
    prefill_chunks,
    start_sequences,
)
from ovis_jax.inference.sampling import Sampling
from ovis_jax.model.kv_cache import resize_rows
from ovis_jax.model.linear import LowRank
from ovis_jax.model.lora import ATTENTION_MATRICES
from ovis_jax.model.ovis import Params
from ovis_jax.plan.abstract_arrays import (
    abstract_inputs,
    abstract_params,
    cache_shapes,
    matrix_shapes,
)
from ovis_jax.plan.aot_compile import (
    analyze_compilation,
    compile_only_mesh,
    compile_only_model,
    lowering_for,
)
from ovis_jax.plan.hlo_analysis import bytes_per_device
from ovis_jax.plan.workload import Workload
from ovis_jax.sharding import adapter_shapes, adapter_shardings

CHUNK_SIZE = 128
"""Number of prompt positions per prefill step; the default of `ovis-jax serve`."""

NUM_PARTIAL_PREFILLS = 4
"""Number of prompts that the program "prefill_chunks x4" reads at a time."""


class EngineProgram(NamedTuple):
    """A program before compilation."""

    lower: Callable[[], Any]
    updated: Any
    """The arrays that the program updates in place."""


def abstract_adapted_params(workload: Workload, mesh: Any, rank: int | None) -> Params:
    """Describe the parameters, with adapters on the decoder's attention matrices.

    Args:
      workload: The workload.
      mesh: Mesh of the parameters.
      rank: Rank of the adapters; None for no adapters.
    """
    flat = abstract_params(workload, mesh)
    if rank is not None:
        shardings = adapter_shardings(workload.config, mesh)
        adapters: dict[str, Any] = {
            path: jax.ShapeDtypeStruct(shape, workload.dtype, sharding=shardings[path])
            for path, shape in adapter_shapes(workload.config, rank, mesh).items()
        }
        for path in filter(re.compile(ATTENTION_MATRICES).fullmatch, flat):
            factors = adapters[f"{path}/lora_a"], adapters[f"{path}/lora_b"]
            flat[path] = LowRank(flat[path], *factors)
    return unflatten_dict(flat, sep="/")


def engine_programs(
    workload: Workload, mesh: Mesh | AbstractMesh, rank: int | None = None
) -> dict[str, EngineProgram]:
    """Return the engine's programs, and "prefill", which reads whole prompts in `generate`.

    Args:
      workload: The workload, whose batch is the slots of the engine.
      mesh: Mesh of the devices to compile for.
      rank: Rank of the adapters; None for no adapters.
    """
    config, model = workload.config, compile_only_model(workload)
    slots, length = workload.batch_size, workload.max_length
    params = abstract_adapted_params(workload, mesh, rank)
    replicated, cache = state_shardings(params, config.decoder.num_kv_heads)
    state_sharding = DecodeState(cache, replicated)
    state = abstract_state(model, params, slots, length)

    def array(shape: Sequence[int], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=replicated)

    def ids(*shape: int) -> Any:
        return array(shape, jnp.int32)

    def masks(rows: int) -> Any:
        return array((rows, -(-config.decoder.vocab_size // 32)), jnp.uint32)

    def program(
        function: Callable[..., Any], donated: int, shardings: Any, *arguments: Any
    ) -> EngineProgram:
        jitted = jax.jit(function, donate_argnums=donated, out_shardings=shardings)
        return EngineProgram(lambda: jitted.lower(*arguments), arguments[donated])

    def decode_program(mode: Any, *more: Any) -> EngineProgram:
        shardings = (state_sharding, replicated)
        active = array((slots,), jnp.bool_)
        return program(partial(decode, model, mode), 1, shardings, params, state, active, *more)

    def prefill_program(n: int) -> EngineProgram:
        chunk, numbers = (ids(n, CHUNK_SIZE), ids(n, CHUNK_SIZE)), (ids(n), ids(n), ids(n))
        arguments = (params, state, visual(n), *chunk, *numbers)
        return program(partial(prefill_chunks, model), 1, (state_sharding, replicated), *arguments)

    def visual(lanes: int) -> Any:
        tokens_per_crop = config.visual_tokenizer.tokens_per_crop
        rows = max(length // tokens_per_crop, 1) * tokens_per_crop
        x = jax.eval_shape(partial(init_visual, model, lanes, rows, jnp.dtype(workload.dtype)))
        return array(x.shape, x.dtype)

    def encode_program(n: int) -> EngineProgram:
        side, channels = config.vision.image_size, config.vision.num_channels
        crops = array((n, side, side, channels), jnp.float32), ids(n), ids(n)
        arguments = params, visual(n), *crops, array((n, 2), jnp.uint32)
        return program(partial(encode_crops, model), 1, replicated, *arguments)

    def start_program() -> EngineProgram:
        one = make_sampling_params(Sampling(), 0, 0)
        sampling = jax.tree.map(lambda x: array((1, *x.shape), x.dtype), one)
        logits = array((1, config.decoder.vocab_size), jnp.float32)
        arguments = (state.sequences, logits, ids(1), ids(1), sampling, masks(1))
        return program(start_sequences, 0, replicated, *arguments)

    def resize_program(old_length: int, new_length: int) -> EngineProgram:
        """Resize a block that caches every position."""
        old, new = (
            abstract_state(model, params, slots, x).cache.blocks for x in (old_length, new_length)
        )
        block = next(i for i in range(config.decoder.depth) if config.decoder.window(i) is None)
        jitted = jax.jit(resize_rows, static_argnames="num_slots", out_shardings=cache.blocks)
        num_slots = jax.tree.leaves(new[block])[0].shape[2]
        return EngineProgram(lambda: jitted.lower(old[block], num_slots=num_slots), ())

    def whole_prefill() -> EngineProgram:
        jitted = jax.jit(model.prefill, static_argnums=2)
        inputs = abstract_inputs(replace(workload, batch_size=1), mesh)
        return EngineProgram(lambda: jitted.lower(params, inputs, length), ())

    shorter = cache_lengths(length)[-2]
    several = NUM_PARTIAL_PREFILLS
    return {
        "decode greedy": decode_program("greedy"),
        "decode temperature": decode_program("temperature"),
        "decode full": decode_program("full"),
        "decode temperature, masks": decode_program("temperature", masks(slots)),
        "decode full, masks": decode_program("full", masks(slots)),
        "prefill_chunks x1": prefill_program(1),
        f"prefill_chunks x{several}": prefill_program(several),
        "encode_crops x1": encode_program(1),
        f"encode_crops x{several}": encode_program(several),
        "start_sequences": start_program(),
        "copy_cache": program(copy_cache, 0, state_sharding, state, ids(), ids()),
        "resize_rows, longer": resize_program(shorter, length),
        "resize_rows, shorter": resize_program(length, shorter),
        "prefill": whole_prefill(),
    }


def analyze_engine_programs(
    workload: Workload, rank: int | None, names: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compile programs from `engine_programs` for the devices of a workload.

    Yields:
      The name of each program, and the result of `analyze_compilation`, with the bytes of the
      arrays that it must update in place ("updated").
    """
    stored = matrix_shapes(workload) + cache_shapes(workload)
    mesh = compile_only_mesh(workload.topology, workload.mesh_sizes)
    with lowering_for(mesh):
        programs = engine_programs(workload, mesh, rank)
        for name in names:
            lower, updated = programs[name]
            analysis = analyze_compilation(lambda lower=lower: lower().compile(), stored)
            yield name, {**analysis, "updated": bytes_per_device(cast(Any, updated))}
