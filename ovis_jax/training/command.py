"""The command `ovis-jax train`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ovis_jax.console import INTERRUPTED
from ovis_jax.errors import require_extra


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
) -> None:
    """Fine-tune a model. If a run was stopped (exit code 4), run the same command to resume it."""
    with require_extra("train"):
        from ovis_jax.training.check import check_recipe
        from ovis_jax.training.config import read_train_config
        from ovis_jax.training.trainer import Trainer
    recipe = read_train_config(config, overrides or ())
    if check:
        raise typer.Exit(0 if check_recipe(recipe, Console()) else 1)
    if not Trainer(recipe, Console()).train():
        raise typer.Exit(INTERRUPTED)
