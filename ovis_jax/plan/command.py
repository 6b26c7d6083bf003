"""The command `ovis-jax plan`."""

import json
from typing import Annotated

import typer
from rich.console import Console

from ovis_jax import presets
from ovis_jax.checkpoint.resolve import BUNDLED, find_folder_or_bundled_checkpoint
from ovis_jax.config import OvisConfig
from ovis_jax.console import (
    BatchSizeOption,
    Dtype,
    KVCacheDtypeOption,
    MaxPartitionOption,
    print_error,
)
from ovis_jax.model.kv_cache import KVCacheDtype
from ovis_jax.plan.make_plan import Method, make_plan
from ovis_jax.plan.report import plan_summary_line, print_plan
from ovis_jax.plan.topologies import parse_mesh_sizes, parse_topology
from ovis_jax.plan.workload import Workload, default_mesh_sizes
from ovis_jax.quantization import QuantizationFormat

PUBLISHED_CONFIGS = {
    "9b": presets.ovis1_6_gemma2_9b,
    "27b": presets.ovis1_6_gemma2_27b,
    "3b": presets.ovis1_6_llama3_2_3b,
}
"""The configs of the published models, by short name."""


MethodOption = Annotated[
    Method,
    typer.Option(
        help='Source of the figures; "auto" means the compiler if installed, else formulas.'
    ),
]


def load_config(name_or_folder: str) -> OvisConfig:
    """Load the config of a published model, a bundled checkpoint or a checkpoint folder.

    Args:
      name_or_folder: A key of `PUBLISHED_CONFIGS` or `BUNDLED`, or a folder with config.json.

    Raises:
      OvisError: The name is unknown, or the config in the folder is not valid.
    """
    if name_or_folder in PUBLISHED_CONFIGS:
        return PUBLISHED_CONFIGS[name_or_folder]()
    advice = f"give {', '.join([*PUBLISHED_CONFIGS, *BUNDLED])}, or a folder with config.json"
    return OvisConfig.from_folder(find_folder_or_bundled_checkpoint(name_or_folder, advice).folder)


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
    quantization: QuantizationFormat | None = None,
    kv_cache_dtype: KVCacheDtype = "auto",
) -> Workload:
    """Build a workload from the names of a topology and a mesh.

    Raises:
      OvisError: The topology or the mesh is unknown or malformed.
    """
    parsed = parse_topology(topology)
    if mesh is None:
        mesh_sizes = default_mesh_sizes(config, parsed.num_devices)
    else:
        mesh_sizes = parse_mesh_sizes(mesh)
    return Workload(
        config,
        parsed,
        mesh_sizes,
        batch_size,
        max_length,
        images_per_row,
        max_partition,
        dtype,
        quantization,
        kv_cache_dtype,
    )


def plan(
    topology: Annotated[
        str,
        typer.Option(
            help="Devices: a TPU topology such as v5e:2x4, its name in Google Cloud such as"
            " v5litepod-8, or GPUs with their number such as rtx4090:1 or h100:8."
        ),
    ],
    config: Annotated[
        str, typer.Option(help="Model: 9b, 27b, 3b, ovis-tiny, or a folder with config.json.")
    ] = "9b",
    batch_size: BatchSizeOption = 1,
    max_model_len: Annotated[
        int,
        typer.Option(min=1, help="Maximum total length of a prompt and its answer, in positions."),
    ] = 8192,
    images: Annotated[int, typer.Option(min=0, help="Number of images per row.")] = 0,
    max_partition: MaxPartitionOption = 9,
    mesh: Annotated[
        str | None,
        typer.Option(
            help='Sizes of the mesh axes, such as data=1,model=8. By default, "model" is as large'
            " as the dimensions of the model allow."
        ),
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="Dtype of activations, weights and KV cache. Gemma2 does not support float16."
        ),
    ] = "bfloat16",
    quantization: Annotated[
        QuantizationFormat | None,
        typer.Option(help="Quantization of the weights; by default, they are not quantized."),
    ] = None,
    kv_cache_dtype: KVCacheDtypeOption = "auto",
    method: MethodOption = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan as a JSON object.")
    ] = False,
) -> None:
    """Check, without devices or weights, whether a model fits on devices and how fast it can be."""
    workload = make_workload(
        load_config(config),
        topology,
        batch_size,
        max_model_len,
        mesh=mesh,
        images_per_row=images,
        max_partition=max_partition,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
    )
    result = make_plan(workload, method, Console(stderr=True, highlight=False).print)
    if as_json:
        print(json.dumps({"config": config, **result}))
    else:
        print_plan(result, Console(highlight=False))
    if not result["fits"]:
        print_error(Console(stderr=True, highlight=False), plan_summary_line(result))
        raise typer.Exit(1)
    if not as_json:
        print(plan_summary_line(result))
