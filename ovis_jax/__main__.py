"""`python -m ovis_jax` runs the command `ovis-jax`."""

from ovis_jax.cli import main

main()
