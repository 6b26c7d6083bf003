"""Conversations of any length become a batch of one of few shapes, each of which compiles once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ovis_jax.config import OvisConfig
from ovis_jax.errors import PromptError
from ovis_jax.inputs.buckets import CROP_BUCKET, TOKEN_BUCKET, Bucket, bucket, choose
from ovis_jax.inputs.conversation import IGNORED
from ovis_jax.inputs.image import IMAGE_SLOT

PADDING = -1
"""The position of what pads a row."""


class Inputs(NamedTuple):
    """A batch: rows are padded on the right, crops at the end.

    Attributes:
      tokens: int32 [B, T]: text ids, -300 for each visual token of a crop, -301..-305 indicators.
      positions: int32 [B, T]: from 0 in each row, -1 where the row is padded.
      pixels: float32 [I, H, W, C]: the crops in order of appearance over the rows, then zeros.
    """

    tokens: np.ndarray
    positions: np.ndarray
    pixels: np.ndarray


class Example(NamedTuple):
    """One conversation, not padded.

    Attributes:
      tokens: int32 [T], as in `Inputs`.
      labels: int32 [T]: the id at each position that is learned, else -100; not shifted.
      pixels: float32 [I, H, W, C].
    """

    tokens: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray


def last_positions(example: Example, limit: int, tokens_per_crop: int) -> Example:
    """Keep the last `limit` positions; a crop that would lose some of its slots goes as a whole."""
    tokens, labels = example.tokens[-limit:], example.labels[-limit:]
    num_crops, rest = divmod(np.count_nonzero(tokens == IMAGE_SLOT), tokens_per_crop)
    # The slots of a crop that was cut stand at the beginning, and its pixels before the others'.
    return Example(tokens[rest:], labels[rest:], example.pixels[len(example.pixels) - num_crops :])


def first_positions(example: Example, limit: int) -> Example:
    """Keep the first `limit` positions.

    Raises:
      PromptError: a crop would lose some of its slots, or no label would be left.
    """
    tokens, labels = example.tokens[:limit], example.labels[:limit]
    if np.any(example.tokens[limit:] == IMAGE_SLOT):
        last = int(np.flatnonzero(example.tokens == IMAGE_SLOT)[-1])
        raise PromptError(
            f"its images reach to position {last}, beyond the {limit} that are kept; keep more, or"
            " cut the images into fewer crops with max_partition"
        )
    if np.all(labels == IGNORED):
        raise PromptError(f"no answer begins within the {limit} positions that are kept")
    return Example(tokens, labels, example.pixels)


def pad_batch(
    rows: Sequence[np.ndarray],
    pixels: np.ndarray,
    config: OvisConfig,
    buckets: Sequence[Bucket] = (),
) -> Inputs:
    """Pad rows int [t] and crops float32 [i, H, W, C] to their buckets.

    Args:
      rows: the ids of each row, every crop expanded to its slots.
      pixels: the crops of all rows, in order of appearance.
      config: names the id that pads a row, and the length beyond which none is padded.
      buckets: the shapes to choose from, rows of padding included; none for those of the ladder.

    Raises:
      RequestError: none of `buckets` holds the batch.
    """
    longest = max(len(row) for row in rows)
    if buckets:
        shape = choose(buckets, len(rows), longest, len(pixels))
    else:
        length = max(longest, min(bucket(longest, TOKEN_BUCKET), config.multimodal_max_length))
        shape = Bucket(len(rows), length, bucket(len(pixels), CROP_BUCKET))
    padded = np.zeros((shape.crops, *pixels.shape[1:]), np.float32)
    padded[: len(pixels)] = pixels
    rows = [*rows, *[np.zeros(0, np.int32)] * (shape.rows - len(rows))]
    positions = pad_rows([np.arange(len(row)) for row in rows], shape.length, PADDING)
    return Inputs(pad_rows(rows, shape.length, config.pad_id), positions, padded)


def pad_rows(rows: Sequence[np.ndarray], length: int, value: int) -> np.ndarray:
    """Rows int [t] as int32 [B, length], filled up with `value`."""
    padded = np.full((len(rows), length), value, np.int32)
    for b, row in enumerate(rows):
        padded[b, : len(row)] = row
    return padded


def as_rows(values: Sequence[ArrayLike] | np.ndarray) -> list[np.ndarray]:
    """A batch, or one row, as rows of their own lengths.

    Raises:
      PromptError: there is none.
    """
    if not len(values):
        raise PromptError("input_ids is empty, expected at least one row of ids")
    if np.ndim(values[0]) == 0:
        return [np.asarray(values)]
    return [np.asarray(row) for row in values]
