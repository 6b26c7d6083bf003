"""The command-line interface `ovis-jax`."""

from typing import Annotated

import typer

import ovis_jax
from ovis_jax.batch.command import batch
from ovis_jax.checkpoint_commands import inspect_command, verify_command
from ovis_jax.compile_cache import enable_compilation_cache
from ovis_jax.console import exit_on_error
from ovis_jax.conversion.from_hf import convert
from ovis_jax.conversion.to_hf import export
from ovis_jax.evaluation.command import eval_
from ovis_jax.generate_and_chat_commands import chat_command, generate_command
from ovis_jax.plan_command import plan
from ovis_jax.server.command import serve
from ovis_jax.training.command import train_command
from ovis_jax.ui.command import ui
from ovis_jax.words.command import draw_visual_words

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command("generate")(generate_command)
app.command("chat")(chat_command)
app.command()(serve)
app.command()(ui)
app.command()(batch)
app.command("train")(train_command)
app.command("eval")(eval_)
app.command()(convert)
app.command()(export)
app.command("inspect")(inspect_command)
app.command("verify")(verify_command)
app.command()(plan)
app.command("words")(draw_visual_words)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"ovis-jax {ovis_jax.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Run, serve, train and convert Ovis1.6 vision-language models in JAX."""


def main() -> None:
    """Run the command-line interface."""
    enable_compilation_cache()
    with exit_on_error():
        app()
