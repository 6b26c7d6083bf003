"""Whether a model fits on devices that are not there, and how fast it could be on them."""
