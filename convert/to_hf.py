"""`python -m convert.to_hf SRC DST`, the same as `ovis-jax export SRC DST`."""

import typer

from ovis_jax.console import exit_on_error
from ovis_jax.conversion.to_hf import export

if __name__ == "__main__":
    with exit_on_error():
        typer.run(export)
