"""How both commands end.

Exit codes: 0 done, 1 the checkpoint is wrong, its configs too, 2 usage, 3 input or output, 4
interrupted.
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
def exits(dst: Path) -> Iterator[Console]:
    """Run the body of a command that writes `dst`; its errors become one line and an exit code.

    Gives the console that errors are printed on.

    Raises:
      typer.Exit: with the code of the error.
    """
    errors = Console(stderr=True)
    # A polite request to end cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield errors
    except OvisError as error:
        print_error(errors, error)
        raise typer.Exit(1 if isinstance(error, CheckpointError | ConfigError) else 2) from None
    except OSError as error:
        print_error(errors, error)
        raise typer.Exit(3) from None
    except KeyboardInterrupt:
        print_error(errors, f"interrupted; {dst} was not written; the same command goes on with it")
        raise typer.Exit(4) from None
