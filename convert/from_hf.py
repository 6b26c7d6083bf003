"""`python -m convert.from_hf SRC DST`, the same as `ovis-jax convert SRC DST`."""

import typer

from ovis_jax.console import exit_on_error
from ovis_jax.conversion.from_hf import convert

if __name__ == "__main__":
    with exit_on_error():
        typer.run(convert)
