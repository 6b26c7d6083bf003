"""Where an image is cut and what it costs: the grid drawn over it, and its place in a prompt."""

from dataclasses import dataclass

from PIL import Image, ImageDraw

from ovis_jax.inputs.image import Grid, choose_grid, crop_boxes, image_boxes, to_rgb
from ovis_jax.inputs.processor import Processor

LONGEST = 640
"""Pixels of the longer side of a drawing."""
SHORTEST = 40
"""Pixels that the shorter side has at least, so that there is something to see."""
BORDER, LINE = "#101418", "#ffffff"
"""Dark beside white: one of the two is seen on any picture."""


@dataclass(frozen=True)
class Cut:
    """How an image is cut."""

    grid: Grid
    crops: int
    """The cells, and the whole image where there are several."""
    positions: int
    """What it takes of a prompt: visual tokens and indicators."""


def cut(processor: Processor, image: Image.Image, max_partition: int) -> Cut:
    """Tell how a processor cuts an image.

    Raises:
      ImageError: the image has no pixels, or `max_partition` is below 1.
    """
    side = processor.image_settings.side
    grid = choose_grid(image.width, image.height, side, max_partition)
    crops = len(image_boxes(image.width, image.height, grid))
    return Cut(grid, crops, processor.image_length([image], max_partition))


def draw_grid(image: Image.Image, grid: Grid) -> Image.Image:
    """Draw the edges of the crops over an image, as the model sees it: RGB, alpha dropped.

    Small images are enlarged and large ones shrunk, so that lines are equally thick on all.

    Raises:
      ImageError: the image has no RGB form.
    """
    scale = LONGEST / max(image.size)
    width, height = (max(SHORTEST, round(length * scale)) for length in image.size)
    enlarged = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    drawing = to_rgb(image).resize((width, height), enlarged)
    pen = ImageDraw.Draw(drawing)
    x, y = drawing.width / image.width, drawing.height / image.height
    boxes = [
        (left * x, upper * y, right * x - 1, lower * y - 1)
        for left, upper, right, lower in crop_boxes(*image.size, grid)
    ]
    for colour, wider in ((BORDER, 5), (LINE, 2)):
        for left, upper, right, lower in boxes:
            box = (left - wider, upper - wider, right + wider, lower + wider)
            pen.rectangle(box, outline=colour, width=2 * wider)
    return drawing
