"""The entry point `python -m ovis_jax`, which is the same as the command `ovis-jax`."""

from ovis_jax.cli import main

main()
