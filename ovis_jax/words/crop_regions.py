"""The regions of an image that are covered by its crops and by their visual tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from ovis_jax.config import VisualTokenizerConfig
from ovis_jax.inputs.image_processing import Box, Grid, crop_boxes_with_thumbnail, fitted_size


@dataclass(frozen=True)
class CropRegion:
    """The region of an image that one crop covers.

    Attributes:
      box: The left, upper, right and lower edges of the crop, in pixels of the image.
      padded_box: The same edges for the square grid of visual tokens. The grid is larger than
        `box` where the crop is padded to a square or the patches are padded to complete tokens.
      tokens_per_side: Number of rows in the grid, which equals the number of columns.
    """

    box: Box
    padded_box: tuple[float, float, float, float]
    tokens_per_side: int


def crop_regions(
    image_width: int, image_height: int, grid: Grid, config: VisualTokenizerConfig
) -> Sequence[CropRegion]:
    """Return the region of each crop of an image, in order; a full-image crop comes first.

    Args:
      image_width: Width of the image in pixels.
      image_height: Height of the image in pixels.
      grid: Numbers of rows and columns that the image is cut into.
      config: Config of the visual tokenizer.
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
