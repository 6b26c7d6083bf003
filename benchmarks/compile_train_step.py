"""How much memory does a training step need on a TPU topology that this machine does not have?

`make bench-train-memory` compiles full fine-tuning and LoRA training of the 9B for eight v5p chips.
It also compiles larger batches for one chip, for the 9B with one block per transformer.
`python -m benchmarks.compile_train_step` has options for other models and topologies. Compilation
needs libtpu but no TPU, and no program is executed. The compiler reports the bytes per device.
"""

from typing import Annotated, Any

import typer
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Column, Table

from benchmarks.support.reduced_depth import with_depth
from benchmarks.support.results import JsonOption, write_results
from ovis_jax.plan.aot_compile import compile_only_mesh, measure_compilation
from ovis_jax.plan.hlo_analysis import bytes_per_device
from ovis_jax.plan.topologies import GIB, MeshSizes, parse_topology
from ovis_jax.plan.workload_from_names import PUBLISHED_CONFIGS
from ovis_jax.sharding import RULES_BY_NAME
from ovis_jax.training.abstract_step import abstract_step, lower_train_step
from ovis_jax.training.config import TrainConfig
from ovis_jax.training.trainable import TRAINABLE_PARTS
from ovis_jax.training.training_workload import TrainingWorkload


def make_recipe(
    mesh: MeshSizes,
    *,
    adapters: bool,
    rules: str = "fsdp",
    rank: int = 16,
    rows: int = 1,
    length: int = 2048,
    trainable: tuple[str, ...] = tuple(TRAINABLE_PARTS),
) -> TrainConfig:
    """Return a recipe in bfloat16 with remat; rows are per device of mesh axis "data"."""
    method = {"lora": {"rank": rank}} if adapters else {"trainable": list(trainable)}
    data = {
        "train_files": ["train.jsonl"],
        "max_partition": 1,
        "max_length": length,
        "micro_batch_size": rows * mesh.data,
        "pad_to_multiple_of": 1,
    }
    return TrainConfig.model_validate(
        {
            "model": "9b",
            "output_dir": "runs/benchmark",
            "data": data,
            "training": {"max_steps": 1000, "compute_dtype": "bfloat16"},
            "run": {"remat": True},
            "mesh": {**mesh._asdict(), "rules": rules},
            **method,
        }
    )


def measure_step_memory(workload: TrainingWorkload, mesh: Mesh) -> dict[str, Any]:
    """Compile a training step and return its memory in bytes per device.

    If the step does not fit, the dict has the entry "error".
    """
    step = abstract_step(workload, mesh)
    found, _ = measure_compilation(lambda: lower_train_step(workload, mesh).compile())
    state, frozen = bytes_per_device(step.state), bytes_per_device(step.frozen)
    return {"state": state, "frozen": frozen, **found}


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
    sizes = MeshSizes(target.num_devices // model_axis, model_axis)
    mesh = compile_only_mesh(target, sizes)
    config, parts = PUBLISHED_CONFIGS[preset](), tuple(trainable or TRAINABLE_PARTS)
    config = config if depth is None else with_depth(config, depth)
    hbm = target.device.memory_bytes
    console, results = Console(), []
    full_name = "full" if trainable is None else ", ".join(trainable)
    for requested, name in ((full, full_name), (adapters, f"adapters, rank {rank}")):
        if not requested:
            continue
        options = {"rules": rules, "rank": rank, "rows": rows, "length": length, "trainable": parts}
        recipe = make_recipe(sizes, adapters=name != full_name, **options)
        workload = TrainingWorkload(config, recipe, target, crops_per_row)
        result = measure_step_memory(workload, mesh)
        fits = "error" not in result and result["peak"] <= hbm
        settings = {**options, "crops_per_row": workload.crops_per_row}
        results.append({"name": name, **settings, "fits": fits, **result})
    devices = f"{topology} as {dict(mesh.shape)}, {rules}, {hbm / GIB:.2f} GiB per device"
    console.print(
        f"{preset}, {devices}; {rows} x {length} positions, {crops_per_row} crops per row"
        + ("" if depth is None else f", {depth} blocks per transformer")
    )
    console.print(memory_table(results))
    where = {"topology": topology, "mesh": dict(mesh.shape), "hbm_gib": hbm / GIB}
    write_results(output, **where, steps=results)


def memory_table(results: list[dict[str, Any]]) -> Table:
    """Return a table with one column per step, in GiB."""
    table = Table("GiB per device", *(Column(x["name"], justify="right") for x in results))
    for name in ("state", "frozen", "arguments", "output", "aliased", "temp", "peak"):
        table.add_row(
            name, *(f"{x[name] / GIB:.2f}" if x.get(name) is not None else "" for x in results)
        )
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
