"""The command `ovis-jax train`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ovis_jax.console import INTERRUPTED
from ovis_jax.errors import require_extra
from ovis_jax.process_agreement import agree
from ovis_jax.process_options import (
    CoordinatorOption,
    DistributedOption,
    NumProcessesOption,
    ProcessIdOption,
    run_in_processes,
)


def train_command(
    config: Annotated[
        Path, typer.Argument(help="Training config (.toml); docs/training.md describes its fields.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Config fields to override, such as training.max_steps=100."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Only read all rows, and print their sizes, the padding and all problems. No"
            " device is used. If there is a problem, the exit code is 1.",
        ),
    ] = False,
    profile: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="STEPS",
            help="Trace this number of steps with the JAX profiler, after the first two, and write"
            " the trace to the folder profile/ of the run.",
        ),
    ] = None,
    distributed: DistributedOption = False,
    coordinator: CoordinatorOption = None,
    num_processes: NumProcessesOption = None,
    process_id: ProcessIdOption = None,
) -> None:
    """Fine-tune a model. If a run was stopped (exit code 4), run the same command to resume it."""
    with require_extra("train"):
        from ovis_jax.training.check import check_recipe
        from ovis_jax.training.config import read_train_config
        from ovis_jax.training.trainer import Trainer
    if check:
        recipe = read_train_config(config, overrides or ())
        raise typer.Exit(0 if check_recipe(recipe, Console()) else 1)
    with run_in_processes(distributed, coordinator, num_processes, process_id):
        with agree("the config"):
            recipe = read_train_config(config, overrides or ())
        finished = Trainer(recipe, Console(), profile).train()
    if not finished:
        raise typer.Exit(INTERRUPTED)
