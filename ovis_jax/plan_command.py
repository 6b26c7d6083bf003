"""The command `ovis-jax plan`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ovis_jax.console import (
    BatchSizeOption,
    Dtype,
    KVCacheDtypeOption,
    MaxPartitionOption,
    print_error,
)
from ovis_jax.errors import OvisError, require_extra
from ovis_jax.plan.make_plan import Method, make_plan
from ovis_jax.plan.report import plan_summary_line, print_plan
from ovis_jax.plan.workload_from_names import PUBLISHED_CONFIGS, load_config, make_workload
from ovis_jax.quantization import QuantizationFormat

MethodOption = Annotated[
    Method,
    typer.Option(
        help='Source of the figures; "auto" means the compiler if installed, else formulas.'
    ),
]


_RECIPE_FIELDS = {
    "config": "model",
    "batch_size": "data.micro_batch_size",
    "max_model_len": "data.max_length",
    "max_partition": "data.max_partition",
    "mesh": "mesh.data and mesh.model",
    "dtype": "training.compute_dtype",
    "quantization": "quantization",
    "kv_cache_dtype": None,
}
"""For each option of requests, the field of a training config that replaces it."""


def plan(
    context: typer.Context,
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
    images: Annotated[
        int | None,
        typer.Option(min=0, help="Number of images per row; by default 0, and 1 with --train."),
    ] = None,
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
    train: Annotated[
        Path | None,
        typer.Option(
            help="Training config (.toml): check whether its training step fits, for rows of"
            " data.max_length positions."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="With --train: config fields to override, such as data.micro_batch_size=1."
            f" The model may be {', '.join(PUBLISHED_CONFIGS)}."
        ),
    ] = None,
    method: MethodOption = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan as a JSON object.")
    ] = False,
) -> None:
    """Check, without devices or weights, whether a model fits on devices and how fast it can be."""
    notify = Console(stderr=True, highlight=False).print
    if train is not None:
        for name, field in _RECIPE_FIELDS.items():
            source = context.get_parameter_source(name)
            if source is not None and source.name != "DEFAULT":
                instead = f"; set {field} instead" if field else ""
                raise OvisError(f"--{name.replace('_', '-')} has no effect with --train{instead}")
        with require_extra("train"):
            from ovis_jax.training.make_training_plan import make_training_plan
            from ovis_jax.training.plan_report import print_training_plan, training_summary_line
            from ovis_jax.training.workload_from_recipe import read_training_workload
        workload = read_training_workload(train, overrides or (), topology, images)
        result = make_training_plan(workload, method, notify)
        _report(
            {"recipe": str(train), **result}, as_json, print_training_plan, training_summary_line
        )
        return
    if overrides:
        raise OvisError(f"override {overrides[0]}: overrides need --train RECIPE")
    workload = make_workload(
        load_config(config),
        topology,
        batch_size,
        max_model_len,
        mesh=mesh,
        images_per_row=images or 0,
        max_partition=max_partition,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
    )
    result = make_plan(workload, method, notify)
    _report({"config": config, **result}, as_json, print_plan, plan_summary_line)


def _report(
    result: dict[str, Any],
    as_json: bool,
    print_tables: Callable[[dict[str, Any], Console], None],
    summary_line: Callable[[dict[str, Any]], str],
) -> None:
    """Print a plan, and exit with code 1 if it does not fit."""
    if as_json:
        print(json.dumps(result))
    else:
        print_tables(result, Console(highlight=False))
    if not result["fits"]:
        print_error(Console(stderr=True, highlight=False), summary_line(result))
        raise typer.Exit(1)
    if not as_json:
        print(summary_line(result))
