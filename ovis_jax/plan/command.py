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
from ovis_jax.plan.report import Method, make_plan, plan_summary_line, print_plan
from ovis_jax.plan.topologies import parse_mesh_sizes, parse_topology
from ovis_jax.plan.workload import Workload, default_mesh_sizes

PUBLISHED_CONFIGS = {"9b": presets.ovis1_6_gemma2_9b, "27b": presets.ovis1_6_gemma2_27b}
"""Configs of the published models by short name."""


def load_config(name_or_folder: str) -> OvisConfig:
    """Load the config of a published model or of a checkpoint folder.

    Args:
      name_or_folder: a key of `PUBLISHED_CONFIGS`, or a folder with config.json.

    Raises:
      OvisError: the name is unknown, or config.json cannot be used.
    """
    if name_or_folder in PUBLISHED_CONFIGS:
        return PUBLISHED_CONFIGS[name_or_folder]()
    if not Path(name_or_folder).is_dir():
        known = ", ".join(PUBLISHED_CONFIGS)
        raise OvisError(
            f"config {name_or_folder!r} is neither a known model nor a folder; expected {known}, or"
            " a folder with config.json"
        )
    return OvisConfig.from_folder(Path(name_or_folder))


def make_workload(
    config: OvisConfig,
    topology: str,
    batch_size: int,
    max_length: int,
    *,
    mesh: str | None = None,
    images_per_row: int = 0,
    max_partition: int = 9,
    dtype: str = "bfloat16",
) -> Workload:
    """Build a workload from the names of a topology and a mesh.

    Raises:
      OvisError: the topology or the mesh is unknown or malformed.
    """
    parsed = parse_topology(topology)
    if mesh is None:
        mesh_sizes = default_mesh_sizes(config, parsed.num_devices)
    else:
        mesh_sizes = parse_mesh_sizes(mesh)
    return Workload(
        config, parsed, mesh_sizes, batch_size, max_length, images_per_row, max_partition, dtype
    )


def plan(
    topology: Annotated[str, typer.Option(help="Devices, such as v5e:2x4 or h100:8.")],
    config: Annotated[
        str, typer.Option(help="Model: 9b, 27b, or a folder with config.json.")
    ] = "9b",
    batch: Annotated[int, typer.Option(help="Batch size in rows.")] = 1,
    max_length: Annotated[
        int, typer.Option(help="Maximum positions per row, prompt and answer together.")
    ] = 8192,
    images: Annotated[int, typer.Option(help="Number of images per row.")] = 0,
    max_partition: Annotated[int, typer.Option(help="Maximum number of cells per image.")] = 9,
    mesh: Annotated[
        str | None,
        typer.Option(help="Mesh sizes, such as data=1,model=8. Default: largest model axis."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of weights and KV cache.")] = "bfloat16",
    method: Annotated[
        Method,
        typer.Option(
            help='Source of the figures; "auto" is the compiler if it is installed, else formulas.'
        ),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check whether a model fits on devices, and how fast it can be, without devices or weights."""
    workload = make_workload(
        load_config(config),
        topology,
        batch,
        max_length,
        mesh=mesh,
        images_per_row=images,
        max_partition=max_partition,
        dtype=dtype,
    )
    result = make_plan(workload, method, Console(stderr=True, highlight=False).print)
    if as_json:
        print(json.dumps({"config": config, **result}))
    else:
        print_plan(result, Console(highlight=False))
    if not result["fits"]:
        raise OvisError(plan_summary_line(result))
    if not as_json:
        print(plan_summary_line(result))
