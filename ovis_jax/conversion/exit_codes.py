"""Exit codes of `convert` and `export`.

0: done. 1: the checkpoint or a config is invalid. 2: usage. 3: input or output. 4: interrupted.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

from ovis_jax.console import print_error
from ovis_jax.errors import CheckpointError, ConfigError, OvisError


@contextmanager
def exit_on_error(destination: Path) -> Iterator[Console]:
    """Print an error of the block in one line, and exit with its code.

    Args:
      destination: folder that the command writes.

    Yields:
      The console for errors.

    Raises:
      typer.Exit: with the exit code.
    """
    console = Console(stderr=True)
    # SIGTERM cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield console
    except OvisError as error:
        print_error(console, error)
        raise typer.Exit(1 if isinstance(error, CheckpointError | ConfigError) else 2) from None
    except OSError as error:
        print_error(console, error)
        raise typer.Exit(3) from None
    except KeyboardInterrupt:
        message = f"interrupted; {destination} was not written; the same command resumes"
        print_error(console, message)
        raise typer.Exit(4) from None
