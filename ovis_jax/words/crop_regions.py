"""Regions of an image that its crops and their visual tokens cover."""

from collections.abc import Sequence
from dataclasses import dataclass

from ovis_jax.config import VisualTokenizerConfig
from ovis_jax.inputs.image_processing import Box, Grid, crop_boxes_with_thumbnail, fitted_size


@dataclass(frozen=True)
class CropRegion:
    """Region of an image that one crop covers.

    Attributes:
      box: Left, upper, right and lower edge of the crop, in pixels of the image.
      token_grid_box: The same edges of the square grid of visual tokens. The grid exceeds the box
        where the crop is padded to a square, or the patches to whole tokens.
      tokens_per_side: Rows, and columns, of the grid.
    """

    box: Box
    token_grid_box: tuple[float, float, float, float]
    tokens_per_side: int


def crop_regions(
    image_width: int, image_height: int, grid: Grid, config: VisualTokenizerConfig
) -> Sequence[CropRegion]:
    """List the regions of an image's crops, in order; a full-image crop comes first.

    Args:
      image_width: Width in pixels.
      image_height: Height in pixels.
      grid: Rows and columns that the image is split into.
      config: Visual tokenizer config.
    """
    crop_size = config.vision.image_size
    covered = config.merged_grid_size * config.hidden_stride * config.vision.patch_size
    regions = []
    for box in crop_boxes_with_thumbnail(image_width, image_height, grid):
        left, upper, right, lower = box
        width, height = fitted_size(right - left, lower - upper, crop_size)
        x_scale, y_scale = (right - left) / width, (lower - upper) / height
        x0 = left - (crop_size - width) // 2 * x_scale
        y0 = upper - (crop_size - height) // 2 * y_scale
        extent = (x0, y0, x0 + covered * x_scale, y0 + covered * y_scale)
        regions.append(CropRegion(box, extent, config.merged_grid_size))
    return regions
