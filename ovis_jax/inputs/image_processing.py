"""Image preprocessing, bit-identical to the original: an image is cut into normalized square crops.

An image is cut into the cells of a grid, and each cell becomes a crop. If there are several cells,
a crop of the full image, the thumbnail, comes first.

Source: `preprocess_image` in ovis/model/visual_tokenizer/base_visual_tokenizer.py of AIDC-AI/Ovis,
commit d248e34, with the image processor of SigLIP in transformers 4.46.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from PIL import Image

from ovis_jax.errors import ImageError
from ovis_jax.json_fields import JsonObject, is_int, read_json

IMAGE_SLOT = -300
"""The id of an image slot: at first one slot per crop, later one slot per visual token."""
IMAGE_START = -301
WHOLE_IMAGE_END = -302
NEXT_COLUMN = -303
NEXT_ROW = -304
IMAGE_END = -305

COVER_THRESHOLD = 0.9
"""A grid is good if its crops, after shrinking, keep more than this fraction of the image's
pixels."""

Grid = tuple[int, int]
"""The number of rows and the number of columns."""
Box = tuple[int, int, int, int]
"""The left, upper, right and lower edges in pixels."""


@dataclass(frozen=True)
class ImageProcessorConfig:
    """The settings in preprocessor_config.json.

    Attributes:
      crop_size: Height and width of a crop in pixels.
      mean: Mean of each color channel, which is subtracted after rescaling.
      std: Standard deviation of each color channel; the result of the subtraction is divided by it.
      rescale_factor: Factor that scales 8-bit values to the range of `mean` and `std`.
    """

    crop_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float

    @classmethod
    def from_folder(cls, folder: Path, image_size: int) -> Self:
        """Read preprocessor_config.json from a checkpoint folder.

        Args:
          folder: The checkpoint folder.
          image_size: The image size in config.json, which the size in the file must equal.

        Raises:
          ConfigError: The file or a field is missing, or a value is not supported.
        """
        name = "preprocessor_config.json"
        fields = JsonObject(read_json(folder / name), name)
        for step in ("do_resize", "do_rescale", "do_normalize"):
            fields.require_value(step, True)
        if fields.get_optional("do_center_crop", None):
            raise fields.error("do_center_crop", True, "false: crops are resized, never cut")
        fields.require_value("resample", int(Image.Resampling.BICUBIC))
        size = fields.get_object("size")
        for edge in ("height", "width"):
            if size.get_positive_int(edge) != image_size:
                raise size.error(edge, size.get(edge), f"image_size {image_size} of config.json")
        return cls(
            crop_size=image_size,
            mean=_three_numbers(fields, "image_mean"),
            std=_three_numbers(fields, "image_std", above=0),
            rescale_factor=fields.get_positive_number("rescale_factor"),
        )


class ImageSize(NamedTuple):
    """The width and height of an image in pixels."""

    width: int
    height: int


class ImageLayout(NamedTuple):
    """The crops that an image is cut into, and the ids that represent the image in a prompt.

    Attributes:
      grid: Number of rows and columns.
      boxes: The part of the image that each crop shows, in order. If there are several cells, the
        thumbnail is first.
      placeholder_ids: The ids that represent the image in a prompt, with one IMAGE_SLOT per crop.
      num_tokens: Number of positions that the image takes in a prompt: visual tokens and
        indicators.
    """

    grid: Grid
    boxes: list[Box]
    placeholder_ids: list[int]
    num_tokens: int


@lru_cache(maxsize=4096)
def choose_grid(width: int, height: int, crop_size: int, max_partition: int) -> Grid:
    """Choose the grid that an image of `width` x `height` pixels is cut into.

    Only grids with at most `max_partition` cells are considered. Among those that cover more than
    0.9 of the image, the grid with the fewest cells is chosen. If no grid covers that much, the
    grid that covers the most is chosen.

    Raises:
      ImageError: The image has no pixels, or `max_partition` is below 1.
    """
    if not is_int(max_partition) or max_partition < 1:
        raise ImageError(
            f"max_partition is {max_partition!r}, expected a whole number of at least 1: "
            "it is the maximum number of cells that an image is cut into"
        )
    if width < 1 or height < 1:
        raise ImageError(f"the image is {width} x {height} pixels, so it is empty")
    covers: list[tuple[Grid, float]] = []
    for rows in range(1, max_partition + 1):
        for columns in range(1, max_partition // rows + 1):
            covered = 0
            # The areas are added one by one, because sum() rounds differently since Python 3.12,
            # and the last bit can decide between two grids.
            for box in grid_boxes(width, height, (rows, columns)):
                covered += _covered_area(box, crop_size)
            covers.append(((rows, columns), covered / (width * height)))
    # Among equal values, min() takes the first, like the original's stable sort.
    if good := [(grid, ratio) for grid, ratio in covers if ratio > COVER_THRESHOLD]:
        return min(good, key=lambda cover: (math.prod(cover[0]), -cover[1]))[0]
    return min(covers, key=lambda cover: (-cover[1], math.prod(cover[0])))[0]


def grid_boxes(width: int, height: int, grid: Grid) -> list[Box]:
    """Return the cells of a grid, row by row. The last row and column get the remaining pixels."""
    rows, columns = grid
    cell_width, cell_height = width // columns, height // rows
    lefts = [column * cell_width for column in range(columns)]
    uppers = [row * cell_height for row in range(rows)]
    rights, lowers = [*lefts[1:], width], [*uppers[1:], height]
    return [
        (left, upper, right, lower)
        for upper, lower in zip(uppers, lowers, strict=True)
        for left, right in zip(lefts, rights, strict=True)
    ]


def crop_boxes_with_thumbnail(width: int, height: int, grid: Grid) -> list[Box]:
    """Return the box of each crop: the full image if there are several cells, then the cells."""
    boxes = grid_boxes(width, height, grid)
    return boxes if len(boxes) == 1 else [(0, 0, width, height), *boxes]


def preprocess_image(
    image: Image.Image, config: ImageProcessorConfig, max_partition: int
) -> tuple[np.ndarray, Grid]:
    """Cut an image into normalized square crops.

    Args:
      image: The image, in any mode that Pillow can convert to RGB.
      config: Crop size and normalization.
      max_partition: Maximum number of grid cells.

    Returns:
      The crops, float32 [I, h, w, C], and the grid. In each crop, the resized pixels are centered
      and padded with 0.0.

    Raises:
      ImageError: The image cannot be decoded or converted to RGB, it is so narrow that a crop would
        have a width or height of 0, or `max_partition` is below 1.
    """
    image = convert_to_rgb(load_image(image))
    grid = choose_grid(image.width, image.height, config.crop_size, max_partition)
    boxes = crop_boxes_with_thumbnail(image.width, image.height, grid)
    sizes = fitted_sizes(image.width, image.height, boxes, config.crop_size)
    squares = [
        _normalized_square(image.crop(box), size, config)
        for box, size in zip(boxes, sizes, strict=True)
    ]
    return np.stack(squares), grid


def load_image(image: Image.Image) -> Image.Image:
    """Decode an image that Pillow opened, in place; this may change its size, as for TIFF files.

    Raises:
      ImageError: The image cannot be decoded.
    """
    try:
        image.load()
    # Pillow's decoders may raise any exception for a damaged file.
    except Exception as error:
        raise ImageError(f"an image of mode {image.mode} cannot be decoded: {error}") from error
    return image


def image_placeholder_ids(grid: Grid) -> list[int]:
    """Return the ids of an image in a prompt: one IMAGE_SLOT per crop, and image indicators."""
    rows, columns = grid
    ids = [IMAGE_START, IMAGE_SLOT, WHOLE_IMAGE_END]
    if math.prod(grid) > 1:
        row = [IMAGE_SLOT, *[NEXT_COLUMN, IMAGE_SLOT] * (columns - 1)]
        ids += [*row, *[NEXT_ROW, *row] * (rows - 1)]
    return [*ids, IMAGE_END]


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB. The alpha channel is dropped, and the EXIF orientation is ignored.

    Raises:
      ImageError: The image cannot be converted to RGB.
    """
    if image.mode == "RGB":
        return image
    try:
        if image.mode == "P":
            # Two steps give the same colors, but Pillow warns if a transparent palette is converted
            # to RGB in one step.
            image = image.convert("RGBA")
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(
            f"an image of mode {image.mode} has no RGB form: {error}; convert it first"
        ) from error


def fitted_sizes(
    width: int, height: int, boxes: Sequence[Box], crop_size: int
) -> list[tuple[int, int]]:
    """Return the width and height of each crop of an image after resizing.

    Raises:
      ImageError: The image is so narrow that a crop would have a width or height of 0.
    """
    sizes = [
        fitted_size(right - left, lower - upper, crop_size) for left, upper, right, lower in boxes
    ]
    if any(0 in size for size in sizes):
        raise ImageError(
            f"the image is {width} x {height} pixels; resized to crops of "
            f"{crop_size} x {crop_size}, its shorter side would be 0 pixels; "
            "cut or pad the image until its longer side is at most "
            f"{crop_size} times its shorter side"
        )
    return sizes


def fitted_size(width: int, height: int, crop_size: int) -> tuple[int, int]:
    """Return the width and height of a crop after its longer side is resized to `crop_size`.

    The result is computed in floating point, in the original's order of operations. With integer
    arithmetic, 28 x 17 at crop size 84 would have height 51 instead of 50.
    """
    if width == height:
        return crop_size, crop_size
    if width > height:
        return crop_size, int(height / width * crop_size)
    return int(width / height * crop_size), crop_size


def _covered_area(box: Box, crop_size: int) -> float:
    """Return the area of a cell after its longer side is shrunk (never enlarged) to `crop_size`."""
    left, upper, right, lower = box
    longer, shorter = max(right - left, lower - upper), min(right - left, lower - upper)
    if longer > crop_size:
        return crop_size * (shorter / longer * crop_size)
    return longer * shorter


def _normalized_square(
    cell: Image.Image, size: tuple[int, int], config: ImageProcessorConfig
) -> np.ndarray:
    """Resize a cell to `size`, normalize it, and center it in a square, float32 [h, w, C]."""
    width, height = size
    # Two calls fix the order of the horizontal and vertical passes, which Pillow 13 reverses for
    # tall images.
    resized = cell.resize((width, cell.height), Image.Resampling.BICUBIC).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    # Same rounding steps as in the original; (u8 - 127.5) / 127.5 would differ in the last bit.
    scaled = (np.asarray(resized, np.float64) * config.rescale_factor).astype(np.float32)
    normalized = (scaled - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
    square = np.zeros((config.crop_size, config.crop_size, 3), np.float32)
    left, upper = (config.crop_size - width) // 2, (config.crop_size - height) // 2
    square[upper : upper + height, left : left + width] = normalized
    return square


def _three_numbers(
    fields: JsonObject, key: str, above: float = -np.inf
) -> tuple[float, float, float]:
    values = fields.get(key)
    if (
        not isinstance(values, list)
        or len(values) != 3
        or any(isinstance(v, bool) or not isinstance(v, int | float) or v <= above for v in values)
    ):
        bound = "" if above == -np.inf else f" above {above:g}"
        raise fields.error(key, values, f"three numbers{bound}, one per color channel")
    return values[0], values[1], values[2]
