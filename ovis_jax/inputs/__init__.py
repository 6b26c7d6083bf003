"""Host side: images and text become numpy arrays, without JAX."""
