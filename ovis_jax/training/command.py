"""The command `ovis-jax train`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ovis_jax.errors import OvisError


def train_command(
    config: Annotated[
        Path, typer.Argument(help="Training config (.toml); docs/training.md describes it.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Config fields to set, such as training.max_steps=100."),
    ] = None,
) -> None:
    """Fine-tune a model. If a run was stopped (exit code 4), the same command resumes it."""
    try:
        from ovis_jax.training.config import read_train_config
        from ovis_jax.training.trainer import Trainer
    except ModuleNotFoundError as error:
        raise OvisError(
            f"{error}; install the training dependencies: pip install '.[train]' in a clone"
        ) from error
    if not Trainer(read_train_config(config, overrides or ()), Console()).train():
        raise typer.Exit(4)
