"""Where the visual tokens of a crop lie in the picture that it was cut from."""

from collections.abc import Sequence
from dataclasses import dataclass

from ovis_jax.config import VisualTokenizerConfig
from ovis_jax.inputs.image import Box, Grid, fitted_size, image_boxes

Extent = tuple[float, float, float, float]
"""Left, upper, right, lower, in pixels of the picture."""


@dataclass(frozen=True)
class Place:
    """Where a crop lies.

    Attributes:
      box: the part of the picture that it shows.
      extent: what its square grid of tokens covers. It reaches beyond the box where the square is
        filled up around the picture, or the grid with blocks of nothing.
      side: rows, and columns, of the grid.
    """

    box: Box
    extent: Extent
    side: int


def places(width: int, height: int, grid: Grid, config: VisualTokenizerConfig) -> Sequence[Place]:
    """The places of a picture's crops, in their order: of several, the whole picture first.

    Args:
      width: of the picture, in pixels.
      height: of the picture, in pixels.
      grid: the rows and columns that it is cut into.
      config: of the model.
    """
    vision = config.vision
    side = config.merged_grid_size
    covered = side * config.hidden_stride * vision.patch_size  # pixels of the square, or more
    found = []
    for box in image_boxes(width, height, grid):
        left, upper, right, lower = box
        fitted = fitted_size(right - left, lower - upper, vision.image_size)
        across, down = (right - left) / fitted[0], (lower - upper) / fitted[1]
        x0 = left - (vision.image_size - fitted[0]) // 2 * across
        y0 = upper - (vision.image_size - fitted[1]) // 2 * down
        extent = (x0, y0, x0 + covered * across, y0 + covered * down)
        found.append(Place(box, extent, side))
    return found
