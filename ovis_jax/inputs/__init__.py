"""Preprocessing on the host: images and text are converted to numpy arrays, without JAX."""
