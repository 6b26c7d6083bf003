"""The command `ovis-jax words`, which shows an image's entropy heat map and visual words."""
