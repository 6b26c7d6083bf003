"""The command `ovis-jax plan`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ovis_jax import presets
from ovis_jax.config import OvisConfig
from ovis_jax.console import Dtype
from ovis_jax.errors import OvisError
from ovis_jax.plan.arguments import Case, default_mesh
from ovis_jax.plan.devices import find_topology, parse_mesh
from ovis_jax.plan.report import By, make_plan, print_plan, verdict

CONFIGS = {"9b": presets.ovis1_6_gemma2_9b, "27b": presets.ovis1_6_gemma2_27b}
"""The published models by a short name."""


def find_config(name: str) -> OvisConfig:
    """The config of a published model by its short name, or of a folder.

    Raises:
      OvisError: it is neither.
    """
    if name in CONFIGS:
        return CONFIGS[name]()
    if not Path(name).is_dir():
        known = ", ".join(CONFIGS)
        raise OvisError(f"config {name!r}: expected {known}, or a folder with config.json")
    return OvisConfig.from_folder(Path(name))


def make_case(
    config: OvisConfig,
    topology: str,
    batch: int,
    max_length: int,
    *,
    mesh: str | None = None,
    images: int = 0,
    max_partition: int = 9,
    dtype: str = "bfloat16",
) -> Case:
    """A case from names; without a mesh, as much of it on "model" as the model's sizes allow."""
    place = find_topology(topology)
    sizes = parse_mesh(mesh) if mesh else None
    data, model = (
        (sizes["data"], sizes["model"]) if sizes else default_mesh(config, place.num_devices)
    )
    return Case(config, place, data, model, batch, max_length, images, max_partition, dtype)


def plan(
    topology: Annotated[str, typer.Option(help="Devices, such as v5e:2x4 or h100:8.")],
    config: Annotated[str, typer.Option(help="9b, 27b, or a folder with config.json.")] = "9b",
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    max_length: Annotated[int, typer.Option(help="Positions a row may reach.")] = 8192,
    images: Annotated[int, typer.Option(help="Images in each row.")] = 0,
    max_partition: Annotated[int, typer.Option(help="The most cells of an image.")] = 9,
    mesh: Annotated[str | None, typer.Option(help="Such as data=1,model=8.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and cache.")] = "bfloat16",
    by: Annotated[By, typer.Option(help="auto compiles where the compiler is there.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether a model fits on devices, and how fast it could be; needs none and no weights."""
    notes = Console(stderr=True, highlight=False)
    case = make_case(
        find_config(config),
        topology,
        batch,
        max_length,
        mesh=mesh,
        images=images,
        max_partition=max_partition,
        dtype=dtype,
    )
    found = make_plan(case, by, notes.print)
    if as_json:
        print(json.dumps({"config": config, **found}))
    else:
        print_plan(found, Console(highlight=False))
    if not found["fits"]:
        raise OvisError(verdict(found))
    if not as_json:
        print(verdict(found))
