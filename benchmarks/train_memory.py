"""Does one training step fit, compiled for a TPU that is not there? Nothing is executed.

`make bench-train-memory` compiles full fine-tuning and low-rank adapters of the 9B model for eight
v5p chips; `python -m benchmarks.train_memory --help` for others. It needs libtpu and no TPU. Bytes
are those of one device, as the compiler counts them.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, KeyPath
from rich.console import Console
from rich.table import Column, Table

from ovis_jax import Ovis
from ovis_jax.config import OvisConfig
from ovis_jax.inputs.batch import Inputs
from ovis_jax.plan.command import CONFIGS
from ovis_jax.plan.compiler import devices_of
from ovis_jax.plan.devices import GIB, find_topology
from ovis_jax.plan.program import bytes_a_device, collectives, memory_of
from ovis_jax.sharding import RULES, adapter_shardings, pad_params, param_shardings
from ovis_jax.training.losses import Batch
from ovis_jax.training.parts import PARTS, Flat, add_adapters, split
from ovis_jax.training.step import Recipe, State, start, step


@dataclass(frozen=True)
class Case:
    """What is compiled: rows and crops are those of one step along one part of mesh axis "data"."""

    adapters: bool
    """Low-rank adapters on the decoder's q, k, v and o over a bfloat16 model; else all learns."""
    rank: int = 16
    rules: str = "fsdp"
    rows: int = 1
    length: int = 2048
    crops: int = 4
    """In each row."""
    micro_batches: int = 1


def arguments(
    config: OvisConfig, recipe: Recipe, mesh: Mesh, case: Case
) -> tuple[State, Flat, Batch]:
    """Shapes of a step's state, frozen parameters and batches, each with its place on the mesh."""
    places = param_shardings(config, mesh, RULES[case.rules])
    if case.adapters:
        places |= adapter_shardings(config, mesh, RULES[case.rules])

    def begin() -> tuple[State, Flat]:
        params = Ovis(config).init(jax.random.key(0))
        params = pad_params(params, config, mesh, RULES[case.rules])
        if not case.adapters:
            learned, frozen = split(params, list(PARTS))
            return start(recipe, learned), frozen
        adapters = add_adapters(params, jax.random.key(0), rank=case.rank)
        return start(recipe, adapters), cast(Flat, flatten_dict(params, sep="/"))

    state, frozen = jax.eval_shape(begin)

    def beside_its_parameter(path: KeyPath, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = str(path[-1].key) if isinstance(path[-1], DictKey) else ""
        return shape(mesh, x.shape, x.dtype, places.get(name))

    rounded = {path: shape(mesh, x.shape, jnp.bfloat16, places[path]) for path, x in frozen.items()}
    return (
        jax.tree_util.tree_map_with_path(beside_its_parameter, state),
        cast(Flat, rounded),
        batches(config, mesh, case),
    )


def batches(config: OvisConfig, mesh: Mesh, case: Case) -> Batch:
    """Shapes of stacked micro-batches, their rows and crops over "data"."""
    place = NamedSharding(mesh, PartitionSpec(None, "data"))
    rows = case.rows * mesh.shape["data"]
    side, channels = config.vision.image_size, config.vision.num_channels
    row_shape = (case.micro_batches, rows, case.length)
    crop_shape = (case.micro_batches, rows * case.crops, side, side, channels)
    tokens = cast(Any, shape(mesh, row_shape, jnp.int32, place))
    pixels = cast(Any, shape(mesh, crop_shape, jnp.float32, place))
    return Batch(Inputs(tokens, tokens, pixels), tokens)


def shape(
    mesh: Mesh, sizes: tuple[int, ...], dtype: Any, place: NamedSharding | None
) -> jax.ShapeDtypeStruct:
    """A shape with its place on the mesh; without one it is whole on every device."""
    return jax.ShapeDtypeStruct(
        sizes, dtype, sharding=place or NamedSharding(mesh, PartitionSpec())
    )


def measure(config: OvisConfig, mesh: Mesh, case: Case) -> dict[str, Any]:
    """Compile the step of a case.

    Raises:
      jax.errors.JaxRuntimeError: the compiler found that it does not fit.
    """
    platform: Any = mesh.devices.flat[0].platform
    model = Ovis(config, remat=True, attention=platform)
    recipe = Recipe(compute_dtype=jnp.bfloat16)
    state, frozen, data = arguments(config, recipe, mesh, case)
    begun = time.perf_counter()
    compiled = step.lower(model, recipe, state, frozen, data).compile()
    took = time.perf_counter() - begun
    return {
        "state": bytes_a_device(state),
        "frozen": bytes_a_device(frozen),
        **memory_of(compiled),
        "collectives": collectives(compiled.as_text() or ""),
        "compile_seconds": took,
    }


def main(
    topology: Annotated[str, typer.Option(help="Chips, as libtpu names them.")] = "v5p:2x2x2",
    model_axis: Annotated[int, typer.Option(help='Size of mesh axis "model".')] = 1,
    rules: Annotated[str, typer.Option(help=", ".join(RULES))] = "fsdp",
    preset: Annotated[str, typer.Option(help=", ".join(CONFIGS))] = "9b",
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 16,
    rows: Annotated[int, typer.Option(help="Rows a micro-batch and device of axis data.")] = 1,
    length: Annotated[int, typer.Option(help="Positions of a row.")] = 2048,
    crops: Annotated[int, typer.Option(help="Crops a row.")] = 4,
    micro_batches: Annotated[int, typer.Option(help="Micro-batches a step.")] = 1,
    full: Annotated[bool, typer.Option(help="Compile full fine-tuning.")] = True,
    adapters: Annotated[bool, typer.Option(help="Compile low-rank adapters.")] = True,
    output: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
) -> None:
    """Compile training steps for a TPU topology and say what they need."""
    place = find_topology(topology)
    mesh = Mesh(np.array(devices_of(place)).reshape(-1, model_axis), ("data", "model"))
    case = Case(False, rank, rules, rows, length, crops, micro_batches)
    hbm = place.device.hbm_bytes
    console, found = Console(), []
    for wanted, name in ((full, "full"), (adapters, f"adapters, rank {rank}")):
        if not wanted:
            continue
        case = replace(case, adapters=name != "full")
        try:
            result: dict[str, Any] = measure(CONFIGS[preset](), mesh, case)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            result = {"error": str(error)}
        fits = "error" not in result and result["peak"] <= hbm
        found.append({"name": name, **asdict(case), "fits": fits, **result})
    shape_text = f"{topology} as {dict(mesh.shape)}, {rules}, {hbm / GIB:.2f} GiB a device"
    console.print(f"{preset}, {shape_text}; {rows} x {length} positions, {crops} crops a row")
    console.print(table(found))
    if output is not None:
        text = {
            "topology": topology,
            "mesh": dict(mesh.shape),
            "hbm_gib": hbm / GIB,
            "steps": found,
        }
        output.write_text(json.dumps(text, indent=2))


def table(found: list[dict[str, Any]]) -> Table:
    """One column a step, in GiB."""
    rows = Table("GiB a device", *(Column(one["name"], justify="right") for one in found))
    sizes = ("state", "frozen", "arguments", "output", "aliased", "temp", "peak")
    for name in sizes:
        rows.add_row(name, *(f"{one[name] / GIB:.2f}" if name in one else "" for one in found))
    rows.add_row("fits", *("yes" if one["fits"] else "no" for one in found))
    kinds = sorted({kind for one in found for kind in one.get("collectives", {})})
    for kind in kinds:
        cells = [one.get("collectives", {}).get(kind) for one in found]
        texts = (f"{c['count']}, {c['bytes'] / GIB:.2f} GiB" if c else "" for c in cells)
        rows.add_row(kind, *texts)
    seconds = (
        f"{one['compile_seconds']:.0f} s" if "compile_seconds" in one else "" for one in found
    )
    rows.add_row("compiled in", *seconds)
    return rows


if __name__ == "__main__":
    typer.run(main)
