"""Random inputs of any shape."""

from typing import Any

import jax
import numpy as np

from ovis_jax import Inputs
from ovis_jax.config import OvisConfig
from ovis_jax.inputs.image_processing import IMAGE_SLOT


def random_inputs(config: OvisConfig, batch_size: int, length: int, crops_per_row: int) -> Inputs:
    """Create rows of random text ids and visual slots, with random pixels.

    Args:
      config: config of the model.
      batch_size: number of rows.
      length: positions per row; raised to fit the visual slots.
      crops_per_row: number of crops per row.
    """
    slots = crops_per_row * config.visual_tokenizer.tokens_per_crop
    length = max(length, slots + 2)
    rng = np.random.default_rng(0)
    tokens = rng.integers(108, config.decoder.vocab_size, (batch_size, length)).astype(np.int32)
    tokens[:, 1 : 1 + slots] = IMAGE_SLOT
    positions = np.tile(np.arange(length, dtype=np.int32), (batch_size, 1))
    side = config.vision.image_size
    pixels = rng.normal(size=(batch_size * crops_per_row, side, side, 3)).astype(np.float32)
    return Inputs(tokens, positions, pixels)


def tree_bytes(tree: Any) -> int:
    """Sum the bytes of all arrays or shapes in a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
