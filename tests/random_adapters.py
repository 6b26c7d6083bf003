"""Adapters that change what a model computes, on every matrix that may have one."""

import re

import numpy as np

from ovis_jax.config import OvisConfig
from ovis_jax.sharding import adapter_axes, axis_letter_sizes, shape_from_axes


def random_adapters(
    config: OvisConfig, rank: int = 4, targets: str = ".*"
) -> dict[str, np.ndarray]:
    """Both halves, float32, for the matrices whose paths match; none is zero."""
    rng = np.random.default_rng(0)
    halves = {}
    for path, letters in adapter_axes(config).items():
        if re.fullmatch(targets, path.rpartition("/")[0]):
            shape = shape_from_axes(letters, axis_letter_sizes(config, path) | {"R": rank})
            std = 0.2 if path.endswith("/lora_b") else shape[1] ** -0.5
            halves[path] = rng.normal(0, std, shape).astype(np.float32)
    return halves
