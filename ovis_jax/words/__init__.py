"""The command `ovis-jax words`: an entropy heat map of an image, and its visual words."""
