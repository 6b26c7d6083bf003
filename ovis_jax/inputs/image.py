"""An image becomes square crops, as the original preprocesses it, bit for bit.

Source: `preprocess_image` in ovis/model/visual_tokenizer/base_visual_tokenizer.py of AIDC-AI/Ovis,
commit d248e34, with the image processor of SigLIP in transformers 4.46.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image, UnidentifiedImageError

from ovis_jax.errors import ImageError, PromptError
from ovis_jax.fields import Fields, is_int, read_json

IMAGE_SLOT = -300
"""The id whose embedding is a crop."""
IMAGE_START = -301
WHOLE_IMAGE_END = -302
NEXT_COLUMN = -303
NEXT_ROW = -304
IMAGE_END = -305

COVER_THRESHOLD = 0.9
"""A grid is good when its crops, shrunk to the side they are fitted to, keep more than this."""

Grid = tuple[int, int]
"""Rows, columns."""
Box = tuple[int, int, int, int]
"""Left, upper, right, lower, in pixels."""
Images = Sequence[Image.Image]


@dataclass(frozen=True)
class ImageSettings:
    """What preprocessor_config.json says: the side of a crop in pixels, and the normalisation."""

    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float

    @classmethod
    def from_folder(cls, folder: Path, image_size: int) -> Self:
        """Read preprocessor_config.json of a checkpoint folder for a model of `image_size` pixels.

        Raises:
          ConfigError: the file or a field is missing, or a field holds what is not supported.
        """
        return cls.from_hf(read_json(folder / "preprocessor_config.json"), image_size)

    @classmethod
    def from_hf(cls, preprocessor: dict[str, Any], image_size: int) -> Self:
        """Read the parsed preprocessor_config.json.

        Raises:
          ConfigError: a field is missing, or holds what is not supported.
        """
        fields = Fields(preprocessor, "preprocessor_config.json")
        for step in ("do_resize", "do_rescale", "do_normalize"):
            fields.require(step, True)
        if fields.optional("do_center_crop", None):
            raise fields.error("do_center_crop", True, "false: the whole crop is fitted")
        fields.require("resample", int(Image.Resampling.BICUBIC))
        size = fields.section("size")
        for edge in ("height", "width"):
            if size.size(edge) != image_size:
                raise size.error(edge, size.get(edge), f"image_size {image_size} of config.json")
        return cls(
            side=image_size,
            mean=_three_numbers(fields, "image_mean"),
            std=_three_numbers(fields, "image_std", above=0),
            rescale_factor=fields.positive("rescale_factor"),
        )


@lru_cache(maxsize=4096)
def choose_grid(width: int, height: int, side: int, max_partition: int) -> Grid:
    """Choose the rows and columns that an image of `width` x `height` pixels is cut into.

    Among the grids of at most `max_partition` cells that cover more than 0.9 of the image: the one
    with the fewest cells. If there is none: the one that covers most.

    Raises:
      ImageError: the image has no pixels, or `max_partition` is below 1.
    """
    if not is_int(max_partition) or max_partition < 1:
        raise ImageError(
            f"max_partition is {max_partition!r}, expected a whole number of at least 1: "
            "it is the largest number of cells an image may be cut into"
        )
    if width < 1 or height < 1:
        raise ImageError(f"the image is {width} x {height} pixels: an image without pixels")
    covers: list[tuple[Grid, float]] = []
    for rows in range(1, max_partition + 1):
        for columns in range(1, max_partition // rows + 1):
            covered = 0
            # Added one by one: since Python 3.12 the sum() of floats rounds in another way than the
            # original's, which decides between grids that differ in the last bit.
            for box in crop_boxes(width, height, (rows, columns)):
                covered += _covered_area(box, side)
            covers.append(((rows, columns), covered / (width * height)))
    # min() takes the first of equals, as the original's stable sort does.
    if good := [(grid, ratio) for grid, ratio in covers if ratio > COVER_THRESHOLD]:
        return min(good, key=lambda cover: (_cells(cover[0]), -cover[1]))[0]
    return min(covers, key=lambda cover: (-cover[1], _cells(cover[0])))[0]


def crop_boxes(width: int, height: int, grid: Grid) -> list[Box]:
    """Cut an image into the cells of a grid, row by row; the last row and column take the rest."""
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


def image_boxes(width: int, height: int, grid: Grid) -> list[Box]:
    """What each crop of an image shows: its cells, and before several the whole image."""
    boxes = crop_boxes(width, height, grid)
    return boxes if len(boxes) == 1 else [(0, 0, width, height), *boxes]


def crops(
    image: Image.Image, settings: ImageSettings, max_partition: int
) -> tuple[np.ndarray, Grid]:
    """Cut an image into normalised square crops: the whole image first when there are several.

    Returns:
      Crops, float32 [I, H, W, C], and the grid. A crop is centred; 0.0 surrounds it.

    Raises:
      ImageError: the image cannot be decoded, is so long and thin that a crop would have no height
        or width, or `max_partition` is below 1.
    """
    try:
        # Pillow decodes a file at its first use, and each decoder raises what it happens to raise.
        image.load()
    except Exception as error:
        raise ImageError(f"an image of mode {image.mode} cannot be decoded: {error}") from error
    image = to_rgb(image)
    grid = choose_grid(image.width, image.height, settings.side, max_partition)
    boxes = image_boxes(image.width, image.height, grid)
    sizes = [
        fitted_size(right - left, lower - upper, settings.side)
        for left, upper, right, lower in boxes
    ]
    if any(0 in size for size in sizes):
        raise ImageError(
            f"the image is {image.width} x {image.height} pixels; fitted to crops of "
            f"{settings.side} x {settings.side}, a shorter side would be 0 pixels; "
            "cut or pad the image until its longer side is at most "
            f"{settings.side} times its shorter"
        )
    squares = [
        _square(image.crop(box), size, settings) for box, size in zip(boxes, sizes, strict=True)
    ]
    return np.stack(squares), grid


def placeholders(grid: Grid) -> list[int]:
    """The ids that stand for an image in a prompt: one IMAGE_SLOT a crop, between indicators."""
    rows, columns = grid
    ids = [IMAGE_START, IMAGE_SLOT, WHOLE_IMAGE_END]
    if _cells(grid) > 1:
        row = [IMAGE_SLOT, *[NEXT_COLUMN, IMAGE_SLOT] * (columns - 1)]
        ids += [*row, *[NEXT_ROW, *row] * (rows - 1)]
    return [*ids, IMAGE_END]


def open_image(path: Path | str) -> Image.Image:
    """Read an image file.

    Raises:
      ImageError: the file cannot be read or decoded, or is too large for Pillow's limit.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    return decode_image(data, str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file that complaints call `name`.

    Raises:
      ImageError: they cannot be decoded, or hold more pixels than Pillow's limit.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} cannot be decoded as an image: Pillow does not know its format"
        ) from error
    # Each of Pillow's decoders raises what its parser happens to raise on a damaged file.
    except Exception as error:
        raise ImageError(f"{name} cannot be decoded as an image: {error}") from error
    return image


def count_images(images: Images, name: str) -> int:
    """How many images a prompt has, when they are images."""
    if not isinstance(images, Sequence):
        raise PromptError(
            f"images of {name} is a {type(images).__name__}, expected a list of PIL images"
        )
    for image in images:
        if not isinstance(image, Image.Image):
            raise ImageError(
                f"an image of {name} is a {type(image).__name__}, expected a PIL image; "
                "open_image reads a file"
            )
    return len(images)


def to_rgb(image: Image.Image) -> Image.Image:
    """Drop alpha, without compositing; EXIF orientation is not applied."""
    if image.mode == "RGB":
        return image
    try:
        if image.mode == "P":
            # The same colours; Pillow warns when it drops a palette's transparency in one step.
            image = image.convert("RGBA")
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(
            f"an image of mode {image.mode} has no RGB form: {error}; convert it first"
        ) from error


def _covered_area(box: Box, side: int) -> float:
    """The area of a cell after it is shrunk (never enlarged) until its longer side is `side`."""
    left, upper, right, lower = box
    longer, shorter = max(right - left, lower - upper), min(right - left, lower - upper)
    if longer > side:
        return side * (shorter / longer * side)
    return longer * shorter


def fitted_size(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height of a crop whose longer side becomes `side`.

    In floats, in this order: 28 x 17 at side 84 gives a height of 50, where integers give 51.
    """
    if width == height:
        return side, side
    if width > height:
        return side, int(height / width * side)
    return int(width / height * side), side


def _square(crop: Image.Image, size: tuple[int, int], settings: ImageSettings) -> np.ndarray:
    """Resize a crop to `size`, normalise it and centre it on a square: float32 [H, W, C]."""
    width, height = size
    # Two calls fix the order of the two 8-bit passes: Pillow 13 takes tall images the other way.
    resized = crop.resize((width, crop.height), Image.Resampling.BICUBIC).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    # The same roundings as the original: (u8 - 127.5) / 127.5 differs in the last bit.
    scaled = (np.asarray(resized, np.float64) * settings.rescale_factor).astype(np.float32)
    normalised = (scaled - np.array(settings.mean, np.float32)) / np.array(settings.std, np.float32)
    square = np.zeros((settings.side, settings.side, 3), np.float32)
    left, upper = (settings.side - width) // 2, (settings.side - height) // 2
    square[upper : upper + height, left : left + width] = normalised
    return square


def _cells(grid: Grid) -> int:
    rows, columns = grid
    return rows * columns


def _three_numbers(fields: Fields, key: str, above: float = -np.inf) -> tuple[float, float, float]:
    """One number a colour channel."""
    values = fields.get(key)
    if (
        not isinstance(values, list)
        or len(values) != 3
        or any(isinstance(v, bool) or not isinstance(v, int | float) or v <= above for v in values)
    ):
        bound = "" if above == -np.inf else f" above {above:g}"
        raise fields.error(key, values, f"three numbers{bound}, one a colour channel")
    return values[0], values[1], values[2]
