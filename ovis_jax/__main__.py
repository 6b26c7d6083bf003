"""`python -m ovis_jax` is the command `ovis-jax`."""

from ovis_jax.cli import main

main()
