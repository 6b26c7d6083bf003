"""How fast is the model on this device, and how far from the device's measured limits?

All weights are random. A share of the bandwidth is the bytes that a program must read, over its
time, over the bandwidth of a copy; a share of the FLOP rate likewise. Memory is what the compiler
reports, next to the estimate of `ovis-jax plan`.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks.support.accelerator.correctness import submit_and_wait
from benchmarks.support.accelerator.random_model import (
    RandomModel,
    max_shardable_devices,
    param_bytes_per_device,
    random_model,
)
from benchmarks.support.accelerator.results import CaseRunner
from benchmarks.support.accelerator.settings import Settings
from benchmarks.support.placeholder_tokenizer import with_placeholder_tokenizer
from benchmarks.support.random_inputs import random_inputs, tree_bytes
from benchmarks.support.stage_costs import (
    StageCost,
    decode_cost,
    prefill_cost,
    vision_cost,
    visual_head_cost,
)
from benchmarks.support.timing import Timings, time_in_turns
from ovis_jax import generate
from ovis_jax.config import OvisConfig
from ovis_jax.engine.scheduler import Scheduler, run_engine
from ovis_jax.inputs.conversation import IGNORE_INDEX
from ovis_jax.model.kv_cache import Cache, empty_cache
from ovis_jax.model.lora import init_adapters
from ovis_jax.plan.hlo_analysis import compiled_memory, count_kernel_calls
from ovis_jax.plan.memory_estimate import MemoryEstimate, estimate_memory
from ovis_jax.plan.topologies import DeviceSpec, MeshSizes
from ovis_jax.plan.workload import Workload

ITEM_BYTES = 2  # bfloat16


def run(settings: Settings, cases: CaseRunner) -> None:
    """Run the part."""
    sizes = settings.sizes
    speed = SpeedMeasurements(settings)
    weights = param_bytes_per_device(sizes.config)

    def decode(rows: int) -> None:
        cases.run(
            f"decode, {rows} row(s)",
            lambda: speed.time_stage(speed.prepare_decode(rows)),
            weights + speed.cache_bytes(rows, sizes.decode_length),
        )

    def prefill(length: int) -> None:
        cases.run(
            f"prompt of {length} positions",
            lambda: speed.time_stage(speed.prepare_prefill(length)),
            weights,
        )

    cases.run("random weights", speed.measure_weights, weights)
    decode(sizes.decode_rows[0])
    prefill(sizes.prompt_lengths[0])
    for crops in sizes.num_crops:
        for name, through_embeddings in (("vision encoder", False), ("visual embeddings", True)):
            cases.run(
                f"{name}, {crops} crop(s)",
                lambda crops=crops, through_embeddings=through_embeddings: speed.time_stage(
                    speed.prepare_vision(crops, through_embeddings=through_embeddings)
                ),
                weights,
            )
    for length in sizes.prompt_lengths[1:]:
        prefill(length)
    for rows in sizes.decode_rows[1:]:
        decode(rows)
    rows = sizes.decode_rows[0]
    cases.run(f"generate, {rows} row(s)", partial(speed.measure_generate, rows), weights)


@dataclass(frozen=True)
class PreparedStage:
    """A compiled stage.

    Attributes:
      call: Runs `steps` steps of the stage.
      step: Runs one step.
      cost: FLOPs and bytes of one step.
      steps: Number of steps per call; times are reported per step.
      units: Name and number per step of what the stage processes, such as tokens.
      fields: Sizes, compile time, memory in bytes on one device, and the kernels.
    """

    call: Callable[[], Any]
    step: Callable[[], Any]
    cost: StageCost
    steps: int
    units: tuple[str, int]
    fields: dict[str, Any]


def compile_program(
    function: Callable[..., Any], *arguments: Any, **options: Any
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Compile a function for arguments.

    Returns:
      The compiled function, and its compile time, memory and kernels.
    """
    start = time.perf_counter()
    compiled = jax.jit(function, **options).lower(*arguments).compile()
    fields: dict[str, Any] = {"compile_seconds": time.perf_counter() - start}
    try:  # a program from the compilation cache may lack them
        fields |= memory_fields(compiled)
        fields["kernels"] = count_kernel_calls(compiled.as_text() or "")
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        print(f"no memory analysis: {error}")
    return compiled, fields


def memory_fields(compiled: Any) -> dict[str, int]:
    """Return the memory of a compiled program in bytes on one device, by name."""
    return {f"{name}_bytes": size for name, size in compiled_memory(compiled).items()}


class SpeedMeasurements:
    """The measurements of one model on the devices of this process."""

    def __init__(self, settings: Settings):
        self.sizes, self.facts = settings.sizes, settings.facts
        self.config: OvisConfig = self.sizes.config

    @property
    def random(self) -> RandomModel:
        """The model with its weights."""
        return random_model(self.config)

    def cache_bytes(self, rows: int, length: int) -> int:
        """Return the bytes of a KV cache on each device."""
        cache = jax.eval_shape(
            lambda: empty_cache(self.config.decoder, rows, length, jnp.bfloat16).blocks
        )
        return tree_bytes(cache) // max_shardable_devices(self.config)

    def estimate(self, rows: int, length: int) -> MemoryEstimate:
        """Return the memory that `ovis-jax plan` estimates for these devices."""
        devices = max_shardable_devices(self.config)
        topology = cast(Any, LocalTopology(devices, self.facts))
        workload = Workload(self.config, topology, MeshSizes(1, devices), rows, length)
        return estimate_memory(workload)

    def limits(self, cost: StageCost, seconds: float) -> dict[str, Any]:
        """Return the shares of the measured bandwidth and FLOP rate that a time reaches."""
        devices = max_shardable_devices(self.config)
        fields = {"bytes": cost.bytes, "flops": cost.flops}
        if bandwidth := self.facts.get("copy_bytes_per_second"):
            fields["bandwidth_share"] = cost.bytes / seconds / (bandwidth * devices)
        if flop_rate := self.facts.get("flops_bfloat16"):
            fields["flop_share"] = cost.flops / seconds / (flop_rate * devices)
        return fields

    def measure_weights(self) -> dict[str, Any]:
        """Make the weights."""
        leaves = jax.tree.leaves(self.random.params)
        mesh = self.random.mesh
        return {
            "parameters": sum(x.size for x in leaves),
            "devices_used": 1 if mesh is None else mesh.size,
        }

    def time_stage(self, stage: PreparedStage) -> dict[str, Any]:
        """Time a stage."""
        times = time_in_turns({"call": stage.call}, self.sizes.repeats)["call"]
        return self.stage_fields(stage, times)

    def stage_fields(self, stage: PreparedStage, times: Timings) -> dict[str, Any]:
        """Return the result of a stage from the times of its calls."""
        step = Timings(tuple(seconds / stage.steps for seconds in times.seconds))
        unit, number = stage.units
        return {
            **stage.fields,
            "step": step.to_json(),
            f"{unit}_per_second": number / step.median,
            **self.limits(stage.cost, step.median),
        }

    def prepare_decode(self, rows: int) -> PreparedStage:
        """Compile the decode step, for rows that have `decode_length` positions in the cache."""
        model, params = self.random.model, self.random.params
        length, steps = self.sizes.decode_length, self.sizes.timed_steps
        capacity = length + steps * self.sizes.decode_calls
        cache = empty_cache(self.config.decoder, rows, capacity, jnp.bfloat16)
        cache = cache._replace(lengths=jnp.full((rows,), length, jnp.int32))
        tokens = jnp.full((rows,), min(200, self.config.decoder.vocab_size - 1), jnp.int32)

        def decode(params: Any, tokens: Any, cache: Cache) -> tuple[Any, Cache]:
            logits, cache = model.decode(params, tokens, cache)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        program, fields = compile_program(decode, params, tokens, cache, donate_argnums=2)

        def step() -> Any:
            nonlocal tokens, cache
            tokens, cache = program(params, tokens, cache)
            return tokens

        def call() -> Any:
            return [step() for _ in range(steps)][-1]

        cost = decode_cost(self.config, rows, (length + capacity) // 2, ITEM_BYTES)
        fields |= {"rows": rows, "positions": length}
        fields["plan_temp_bytes"] = self.estimate(rows, capacity).decode_temp
        return PreparedStage(call, step, cost, steps, ("tokens", rows), fields)

    def prepare_prefill(self, length: int) -> PreparedStage:
        """Compile the prefill of a text prompt."""
        model, params = self.random.model, self.random.params
        inputs = jax.device_put(random_inputs(self.config, 1, length, crops_per_row=0))
        program, fields = compile_program(
            lambda params, inputs: model.prefill(params, inputs, length), params, inputs
        )
        cost = prefill_cost(self.config, 1, length, ITEM_BYTES)
        fields |= {"rows": 1, "positions": length}
        fields["plan_temp_bytes"] = self.estimate(1, length).prefill_temp

        def call() -> Any:
            return program(params, inputs)

        return PreparedStage(call, call, cost, 1, ("tokens", length), fields)

    def prepare_vision(self, crops: int, *, through_embeddings: bool) -> PreparedStage:
        """Compile the vision encoder, or everything from pixels to visual embeddings."""
        model = self.random.model
        parts = ("vision", "visual_tokenizer", "visual_embedding")
        params = {part: self.random.params[part] for part in parts}
        pixels = jax.device_put(random_inputs(self.config, 1, 1, crops).pixels)
        cost = vision_cost(self.config, crops, ITEM_BYTES)
        if through_embeddings:
            cost += visual_head_cost(self.config, crops, ITEM_BYTES)
        program, fields = compile_program(
            model.embed_images
            if through_embeddings
            else lambda params, pixels: model.encode_vision(params, pixels)[-1],
            params,
            pixels,
        )
        fields["crops"] = crops

        def call() -> Any:
            return program(params, pixels)

        return PreparedStage(call, call, cost, 1, ("crops", crops), fields)

    def measure_generate(self, rows: int) -> dict[str, Any]:
        """Time `generate`: the seconds per token after the first, in its own loop."""
        model, params = self.random.model, self.random.params
        length, steps = self.sizes.decode_length, self.sizes.timed_steps
        inputs = random_inputs(self.config, rows, length, crops_per_row=0)
        start = time.perf_counter()
        calls = {
            str(tokens): partial(generate, model, params, inputs, max_new_tokens=tokens)
            for tokens in (1, steps + 1)
        }
        jax.block_until_ready([call() for call in calls.values()])
        compile_seconds = time.perf_counter() - start
        times = time_in_turns(calls, self.sizes.repeats, warmup_rounds=0)
        differences = [
            (long - short) / steps
            for short, long in zip(*(t.seconds for t in times.values()), strict=True)
        ]
        step = Timings(tuple(differences))
        fields = {
            "rows": rows,
            "positions": length,
            "step": step.to_json(),
            "compile_and_first_call_seconds": compile_seconds,
        }
        if step.median <= 0:  # the steps take less time than two calls differ by
            return fields
        cost = decode_cost(self.config, rows, length + steps // 2, ITEM_BYTES)
        limits = self.limits(cost, step.median)
        return fields | {"tokens_per_second": rows / step.median} | limits

    @contextmanager
    def run_engine(self) -> Iterator[tuple[Scheduler, float]]:
        """Run an engine; yields it and the seconds of its start, which compiles all programs."""
        slots, length = max(self.sizes.concurrent_requests), self.sizes.max_model_len
        ovis = with_placeholder_tokenizer(self.random.model, self.random.params)
        start = time.perf_counter()
        with run_engine(
            ovis,
            max_num_seqs=slots,
            max_model_len=length,
            chunk_size=min(256, length),
            max_queued_requests=slots,
            enable_prefix_caching=False,  # the requests are all the same
        ) as scheduler:
            yield scheduler, time.perf_counter() - start

    def measure_engine(self, scheduler: Scheduler, concurrent: int) -> dict[str, Any]:
        """Time requests with a picture of one crop, all submitted at the same time."""
        config, new_tokens = self.config, self.sizes.request_tokens
        inputs = random_inputs(
            config, 1, config.visual_tokenizer.tokens_per_crop + 32, crops_per_row=1
        )
        prompts = [(inputs.tokens[0], inputs.pixels)] * concurrent
        times = time_in_turns(
            {"call": partial(submit_and_wait, scheduler, prompts, new_tokens)}, repeats=2
        )["call"]
        return {
            "requests": concurrent,
            "positions": inputs.tokens.shape[1],
            "new_tokens": new_tokens,
            "call": times.to_json(),
            "tokens_per_second": concurrent * new_tokens / times.median,
            "requests_per_second": concurrent / times.median,
        }

    def measure_training(self) -> dict[str, Any]:
        """Time a training step of adapters on the decoder's q, k, v and o."""
        # Imported here because training needs pydantic.
        from ovis_jax.training.config import StepConfig
        from ovis_jax.training.losses import TrainBatch
        from ovis_jax.training.train_step import (
            init_train_state,
            stack_micro_batches,
            train_step,
        )

        config, sizes = self.config, self.sizes
        model = replace(self.random.model, remat=True)
        step_config = StepConfig(max_steps=1000, compute_dtype="bfloat16")
        adapters = init_adapters(self.random.params, jax.random.key(0), rank=16)
        state = init_train_state(step_config, adapters)
        frozen = cast(Any, flatten_dict(self.random.params, sep="/"))
        inputs = random_inputs(config, 1, sizes.train_length, sizes.train_crops)
        length = inputs.tokens.shape[1]
        labels = np.where(np.arange(length) >= length // 2, inputs.tokens, IGNORE_INDEX)
        labels = np.where(inputs.tokens < 0, IGNORE_INDEX, labels)
        batches = jax.device_put(stack_micro_batches([TrainBatch(inputs, jnp.asarray(labels))]))
        start = time.perf_counter()
        compiled = train_step.lower(model, step_config, state, frozen, batches).compile()
        compile_seconds = time.perf_counter() - start
        seconds, losses = [], []
        for _ in range(1 + sizes.repeats):
            start = time.perf_counter()
            state, metrics = compiled(state, frozen, batches)
            losses.append(float(metrics.loss))
            seconds.append(time.perf_counter() - start)
        times = Timings(tuple(seconds[1:]))
        if not np.isfinite(losses).all():
            raise FloatingPointError(f"the losses are {losses}")
        return {
            "positions": length,
            "crops": sizes.train_crops,
            "call": times.to_json(),
            "tokens_per_second": length / times.median,
            "losses": losses,
            "compile_seconds": compile_seconds,
            **memory_fields(compiled),
        }


class LocalTopology:
    """The devices of this process, as `Workload` expects a topology.

    Args:
      num_devices: Number of devices.
      facts: Results of the part "facts".
    """

    def __init__(self, num_devices: int, facts: dict[str, Any]):
        self.num_devices = num_devices
        self.device = DeviceSpec(
            "tpu" if jax.default_backend() == "tpu" else "cuda",
            memory_bytes=facts.get("memory_bytes") or 2**40,
            memory_bandwidth=math.inf,
            peak_flops=math.inf,
            link_bandwidth=math.inf,
            shapes=(),
        )
