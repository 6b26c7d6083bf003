"""The command line `ovis-jax`."""

import sys
from typing import Annotated

import typer
from rich.console import Console

import ovis_jax
from ovis_jax.chat_commands import chat_command, generate_command
from ovis_jax.checkpoint_commands import inspect_command, verify_command
from ovis_jax.compile_cache import enable_compilation_cache
from ovis_jax.console import print_error
from ovis_jax.conversion.from_hf import convert
from ovis_jax.conversion.to_hf import export
from ovis_jax.errors import OvisError
from ovis_jax.evaluation.command import eval_
from ovis_jax.plan.command import plan
from ovis_jax.server.command import serve
from ovis_jax.training.command import train_command
from ovis_jax.ui.command import ui
from ovis_jax.words.command import draw_visual_words

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command("generate")(generate_command)
app.command("chat")(chat_command)
app.command()(serve)
app.command()(ui)
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
    """Ovis1.6-Gemma2 vision-language models in JAX."""


def main() -> None:
    """Run the command line. Invalid input prints one line on stderr and exits with code 2."""
    enable_compilation_cache()
    try:
        app()
    except (OvisError, OSError) as error:
        print_error(Console(stderr=True, highlight=False), error)
        sys.exit(2)
