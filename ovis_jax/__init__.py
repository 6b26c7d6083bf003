"""Ovis1.6-Gemma2 in pure JAX."""
