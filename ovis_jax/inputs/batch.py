"""Padding encoded conversations of any length to one batch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ovis_jax.config import OvisConfig
from ovis_jax.errors import PromptError
from ovis_jax.inputs.buckets import CROP_BUCKET, TOKEN_BUCKET, Bucket, bucket_size, choose_bucket
from ovis_jax.inputs.conversation import IGNORE_INDEX
from ovis_jax.inputs.image_processing import IMAGE_SLOT

PADDING_POSITION = -1
"""The value of `Inputs.positions` at padding."""


class Inputs(NamedTuple):
    """A batch of model inputs. Rows are padded on the right, and crops are padded at the end.

    Attributes:
      tokens: Token ids, int32 [B, T]: text ids, -300 for each visual token of a crop, and -301 to
        -305 for image indicators.
      positions: Positions, int32 [B, T]: 0, 1, ... in each row; -1 at padding.
      pixels: Crops of all rows in order of appearance, float32 [I, h, w, C], followed by zeros as
        padding.
    """

    tokens: np.ndarray
    positions: np.ndarray
    pixels: np.ndarray


class Example(NamedTuple):
    """One encoded conversation without padding.

    Attributes:
      tokens: Token ids, int32 [T], as in `Inputs`.
      labels: Labels, int32 [T], not shifted: the token id at positions that contribute to the loss,
        -100 elsewhere.
      pixels: Crops, float32 [I, h, w, C].
    """

    tokens: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray


def truncate_left(example: Example, max_length: int, tokens_per_crop: int) -> Example:
    """Keep the last `max_length` positions; a crop that would be cut is dropped completely."""
    tokens, labels = example.tokens[-max_length:], example.labels[-max_length:]
    num_crops, rest = divmod(np.count_nonzero(tokens == IMAGE_SLOT), tokens_per_crop)
    # The remaining slots of a partly cut crop come first, and so do the pixels of all dropped
    # crops.
    return Example(tokens[rest:], labels[rest:], example.pixels[len(example.pixels) - num_crops :])


def truncate_right(example: Example, max_length: int) -> Example:
    """Keep the first `max_length` positions.

    Raises:
      PromptError: The cut would go through an image, or no label would remain.
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
    """Pad rows and crops to the shape of a bucket.

    Args:
      rows: Token ids of each row, int [t], with one -300 per visual token.
      pixels: Crops of all rows in order of appearance, float32 [I, h, w, C].
      config: Config of the model, which determines the pad id and the maximum length.
      buckets: The shapes to choose from; if empty, the default lengths are used.

    Raises:
      RequestError: The batch does not fit into any of `buckets`.
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
    """Pad rows of shape [t] on the right with `value`, and return them as int32 [B, length]."""
    padded = np.full((len(rows), length), value, np.int32)
    for b, row in enumerate(rows):
        padded[b, : len(row)] = row
    return padded
