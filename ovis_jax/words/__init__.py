"""The command `ovis-jax words`: a look at the visual words of pictures."""
