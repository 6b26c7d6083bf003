"""How much memory does a training step need on a TPU topology that this machine does not have?

`make bench-train-memory` compiles full fine-tuning and LoRA training of the 9B for eight v5p chips.
It also compiles larger batches for one chip, for the 9B with one block per transformer.
`python -m benchmarks.compile_train_step` has options for other models and topologies. Compilation
needs libtpu but no TPU, and no program is executed. The compiler reports the bytes per device.
"""

import time
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, KeyPath
from ovis_jax.plan.command import PUBLISHED_CONFIGS
from rich.console import Console
from rich.table import Column, Table

from benchmarks.support.results import JsonOption, write_results
from ovis_jax import Ovis
from ovis_jax.config import OvisConfig
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model.lora import init_adapters
from ovis_jax.plan.aot_compile import compile_only_devices
from ovis_jax.plan.hlo_analysis import (
    bytes_per_device,
    collective_counts_and_bytes,
    compiled_memory,
)
from ovis_jax.plan.topologies import GIB, parse_topology
from ovis_jax.sharding import RULES_BY_NAME, adapter_shardings, pad_params, param_shardings
from ovis_jax.training.config import StepConfig
from ovis_jax.training.losses import TrainBatch
from ovis_jax.training.train_step import TrainState, init_train_state, train_step
from ovis_jax.training.trainable import TRAINABLE_PARTS, FrozenParams, split_params


@dataclass(frozen=True)
class TrainingWorkload:
    """A training step to compile; rows and crops are per device of mesh axis "data"."""

    adapters: bool
    """Train adapters on the decoder's q, k, v and o over a bfloat16 model, not the whole model."""
    rank: int = 16
    rules: str = "fsdp"
    rows: int = 1
    length: int = 2048
    crops_per_row: int = 4
    micro_batches: int = 1
    trainable: tuple[str, ...] = tuple(TRAINABLE_PARTS)
    """Trainable parts of a step without adapters."""


def with_depth(config: OvisConfig, depth: int) -> OvisConfig:
    """Return the config of a model with `depth` blocks in each transformer."""
    tokenizer = replace(config.visual_tokenizer, vision=replace(config.vision, depth=depth))
    return replace(config, visual_tokenizer=tokenizer, decoder=replace(config.decoder, depth=depth))


def abstract_step_arguments(
    config: OvisConfig, step_config: StepConfig, mesh: Mesh, workload: TrainingWorkload
) -> tuple[TrainState, FrozenParams, TrainBatch]:
    """Return the state, the frozen parameters and the batch of a step as sharded shapes."""
    rules = RULES_BY_NAME[workload.rules]
    shardings = param_shardings(config, mesh, rules)
    if workload.adapters:
        shardings |= adapter_shardings(config, mesh, rules)

    def init() -> tuple[TrainState, FrozenParams]:
        params = Ovis(config).init(jax.random.key(0))
        params = pad_params(params, config, mesh, rules)
        if not workload.adapters:
            trainable, frozen = split_params(params, workload.trainable)
            return init_train_state(step_config, trainable), frozen
        adapters = init_adapters(params, jax.random.key(0), rank=workload.rank)
        frozen = cast(FrozenParams, flatten_dict(params, sep="/"))
        return init_train_state(step_config, adapters), frozen

    state, frozen = jax.eval_shape(init)

    def shard_like_parameter(path: KeyPath, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = str(path[-1].key) if isinstance(path[-1], DictKey) else ""
        return abstract_array(mesh, x.shape, x.dtype, shardings.get(name))

    bfloat16_frozen = {
        path: abstract_array(mesh, x.shape, jnp.bfloat16, shardings[path])
        for path, x in frozen.items()
    }
    return (
        jax.tree_util.tree_map_with_path(shard_like_parameter, state),
        cast(FrozenParams, bfloat16_frozen),
        abstract_batch(config, mesh, workload),
    )


def abstract_batch(config: OvisConfig, mesh: Mesh, workload: TrainingWorkload) -> TrainBatch:
    """Return stacked micro-batches as shapes whose rows and crops are sharded over "data"."""
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
    rows = workload.rows * mesh.shape["data"]
    side, channels = config.vision.image_size, config.vision.num_channels
    row_shape = (workload.micro_batches, rows, workload.length)
    crop_shape = (workload.micro_batches, rows * workload.crops_per_row, side, side, channels)
    tokens = cast(Any, abstract_array(mesh, row_shape, jnp.int32, sharding))
    pixels = cast(Any, abstract_array(mesh, crop_shape, jnp.float32, sharding))
    return TrainBatch(Inputs(tokens, tokens, pixels), tokens)


def abstract_array(
    mesh: Mesh, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None
) -> jax.ShapeDtypeStruct:
    """Return a shape with a sharding; None replicates the array over the mesh."""
    sharding = sharding or NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def measure_step_memory(
    config: OvisConfig, mesh: Mesh, workload: TrainingWorkload
) -> dict[str, Any]:
    """Compile a training step and return its memory in bytes per device.

    Raises:
      jax.errors.JaxRuntimeError: the step does not fit.
    """
    platform: Any = mesh.devices.flat[0].platform
    model = Ovis(config, remat=True, platform=platform)
    step_config = StepConfig(max_steps=1000, compute_dtype="bfloat16")
    state, frozen, batch = abstract_step_arguments(config, step_config, mesh, workload)
    start = time.perf_counter()
    compiled = train_step.lower(model, step_config, state, frozen, batch).compile()
    seconds = time.perf_counter() - start
    return {
        "state": bytes_per_device(state),
        "frozen": bytes_per_device(frozen),
        **compiled_memory(compiled),
        "collectives": collective_counts_and_bytes(compiled.as_text() or ""),
        "compile_seconds": seconds,
    }


def main(
    topology: Annotated[str, typer.Option(help="Topology by its libtpu name.")] = "v5p:2x2x2",
    model_axis: Annotated[int, typer.Option(help='Size of the mesh axis "model".')] = 1,
    rules: Annotated[
        str, typer.Option(help=f"Sharding rules: {', '.join(RULES_BY_NAME)}.")
    ] = "fsdp",
    preset: Annotated[str, typer.Option(help=f"Model: {', '.join(PUBLISHED_CONFIGS)}.")] = "9b",
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    rows: Annotated[
        int, typer.Option(help='Rows per micro-batch on each device of the mesh axis "data".')
    ] = 1,
    length: Annotated[int, typer.Option(help="Number of positions per row.")] = 2048,
    crops_per_row: Annotated[int, typer.Option(help="Number of crops per row.")] = 4,
    micro_batches: Annotated[int, typer.Option(help="Number of micro-batches per step.")] = 1,
    depth: Annotated[
        int | None,
        typer.Option(help="Number of blocks in each transformer; by default, that of the model."),
    ] = None,
    trainable: Annotated[
        list[str] | None,
        typer.Option(
            help="Part to train without adapters; may be repeated. By default, all parts."
        ),
    ] = None,
    full: Annotated[bool, typer.Option(help="Compile a step without adapters.")] = True,
    adapters: Annotated[bool, typer.Option(help="Compile a training step of adapters.")] = True,
    output: JsonOption = None,
) -> None:
    """Compile training steps for a TPU topology, and print the memory that they need."""
    target = parse_topology(topology)
    mesh = Mesh(np.array(compile_only_devices(target)).reshape(-1, model_axis), ("data", "model"))
    config, parts = PUBLISHED_CONFIGS[preset](), tuple(trainable or TRAINABLE_PARTS)
    config = config if depth is None else with_depth(config, depth)
    workload = TrainingWorkload(
        False, rank, rules, rows, length, crops_per_row, micro_batches, parts
    )
    hbm = target.device.memory_bytes
    console, results = Console(), []
    full_name = "full" if trainable is None else ", ".join(trainable)
    for requested, name in ((full, full_name), (adapters, f"adapters, rank {rank}")):
        if not requested:
            continue
        workload = replace(workload, adapters=name != full_name)
        try:
            result: dict[str, Any] = measure_step_memory(config, mesh, workload)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            result = {"error": str(error)}
        fits = "error" not in result and result["peak"] <= hbm
        results.append({"name": name, **asdict(workload), "fits": fits, **result})
    devices = f"{topology} as {dict(mesh.shape)}, {rules}, {hbm / GIB:.2f} GiB per device"
    console.print(
        f"{preset}, {devices}; {rows} x {length} positions, {crops_per_row} crops per row"
        + ("" if depth is None else f", {depth} blocks per transformer")
    )
    console.print(memory_table(results))
    settings = {"topology": topology, "mesh": dict(mesh.shape), "hbm_gib": hbm / GIB}
    write_results(output, **settings, steps=results)


def memory_table(results: list[dict[str, Any]]) -> Table:
    """Return a table with one column per step, in GiB."""
    table = Table("GiB per device", *(Column(x["name"], justify="right") for x in results))
    for name in ("state", "frozen", "arguments", "output", "aliased", "temp", "peak"):
        table.add_row(name, *(f"{x[name] / GIB:.2f}" if name in x else "" for x in results))
    table.add_row("fits", *("yes" if x["fits"] else "no" for x in results))
    for kind in sorted({kind for x in results for kind in x.get("collectives", {})}):
        collectives = [x.get("collectives", {}).get(kind) for x in results]
        table.add_row(
            kind, *(f"{c['count']}, {c['bytes'] / GIB:.2f} GiB" if c else "" for c in collectives)
        )
    seconds = (f"{x['compile_seconds']:.0f} s" if "compile_seconds" in x else "" for x in results)
    table.add_row("compiled in", *seconds)
    return table


if __name__ == "__main__":
    typer.run(main)
