"""Encoded conversations of any length become one padded batch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ovis_jax.config import OvisConfig
from ovis_jax.errors import PromptError
from ovis_jax.inputs.buckets import CROP_BUCKET, TOKEN_BUCKET, Bucket, bucket_size, choose_bucket
from ovis_jax.inputs.conversation import IGNORE_INDEX
from ovis_jax.inputs.image_processing import IMAGE_SLOT

PADDING_POSITION = -1
"""The position of padding in a row."""


class Inputs(NamedTuple):
    """A batch: rows are padded on the right, crops at the end.

    Attributes:
      tokens: int32 [B, T]: text ids, -300 for each visual token of a crop, -301 to -305 for image
        indicators.
      positions: int32 [B, T]: 0, 1, ... in each row, -1 at padding.
      pixels: float32 [I, h, w, C]: the crops of all rows in order of appearance, then zeros.
    """

    tokens: np.ndarray
    positions: np.ndarray
    pixels: np.ndarray


class Example(NamedTuple):
    """One encoded conversation without padding.

    Attributes:
      tokens: int32 [T], as in `Inputs`.
      labels: int32 [T]: the id where the model learns it, else -100; not shifted.
      pixels: float32 [I, h, w, C].
    """

    tokens: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray


def truncate_left(example: Example, max_length: int, tokens_per_crop: int) -> Example:
    """Keep the last `max_length` positions, but drop a crop completely if any of it is cut off."""
    tokens, labels = example.tokens[-max_length:], example.labels[-max_length:]
    num_crops, rest = divmod(np.count_nonzero(tokens == IMAGE_SLOT), tokens_per_crop)
    # The slots left over from a cut crop come first, and so do the pixels of all dropped crops.
    return Example(tokens[rest:], labels[rest:], example.pixels[len(example.pixels) - num_crops :])


def truncate_right(example: Example, max_length: int) -> Example:
    """Keep the first `max_length` positions.

    Raises:
      PromptError: The cut would go through an image, or leave nothing to learn.
    """
    tokens, labels = example.tokens[:max_length], example.labels[:max_length]
    if np.any(example.tokens[max_length:] == IMAGE_SLOT):
        last = int(np.flatnonzero(example.tokens == IMAGE_SLOT)[-1])
        raise PromptError(
            f"its images reach position {last}, but only {max_length} positions are kept; keep "
            "more, or cut the images into fewer crops with max_partition"
        )
    if np.all(labels == IGNORE_INDEX):
        raise PromptError(f"no answer begins within the first {max_length} positions, the limit")
    return Example(tokens, labels, example.pixels)


def pad_batch(
    rows: Sequence[np.ndarray],
    pixels: np.ndarray,
    config: OvisConfig,
    buckets: Sequence[Bucket] = (),
) -> Inputs:
    """Pad rows and crops to their bucket.

    Args:
      rows: The ids of each row, int [t], with one -300 per visual token.
      pixels: float32 [I, h, w, C], the crops of all rows in order of appearance.
      config: The model, which sets the id of padding and the maximum length.
      buckets: The shapes to choose from; if empty, the default ladder of lengths is used.

    Raises:
      RequestError: None of `buckets` holds the batch.
    """
    longest = max(len(row) for row in rows)
    if buckets:
        shape = choose_bucket(buckets, len(rows), longest, len(pixels))
    else:
        length = min(bucket_size(longest, TOKEN_BUCKET), config.multimodal_max_length)
        shape = Bucket(len(rows), max(longest, length), bucket_size(len(pixels), CROP_BUCKET))
    padded = np.zeros((shape.crops, *pixels.shape[1:]), np.float32)
    padded[: len(pixels)] = pixels
    rows = [*rows, *[np.zeros(0, np.int32)] * (shape.rows - len(rows))]
    positions = pad_rows([np.arange(len(row)) for row in rows], shape.length, PADDING_POSITION)
    return Inputs(pad_rows(rows, shape.length, config.pad_id), positions, padded)


def pad_rows(rows: Sequence[np.ndarray], length: int, value: int) -> np.ndarray:
    """Pad rows int [t] on the right with `value`: int32 [B, length]."""
    padded = np.full((len(rows), length), value, np.int32)
    for b, row in enumerate(rows):
        padded[b, : len(row)] = row
    return padded
