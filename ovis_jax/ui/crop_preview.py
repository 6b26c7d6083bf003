"""HTML previews of images, with the crops that the model sees and the number of tokens."""

import base64
import io
from collections.abc import Sequence

from PIL import Image, ImageDraw

from ovis_jax.errors import ImageError
from ovis_jax.inputs.image_processing import Grid, ImageLayout, convert_to_rgb, grid_boxes
from ovis_jax.inputs.processor import Processor

LONGER_SIDE = 640
"""Length of a drawing's longer side, in pixels."""
MIN_SHORTER_SIDE = 40
"""Minimum length of a drawing's shorter side, in pixels."""
OUTLINE_COLOR, LINE_COLOR = "#101418", "#ffffff"
"""Colors of the lines. A white line with a dark outline is visible on any image."""

NO_IMAGES_HTML = (
    '<p class="quiet">Attach a picture to see the crops that the model reads '
    "and the number of tokens they take.</p>"
)


def render_crop_previews(
    processor: Processor, images: Sequence[Image.Image], max_partition: int
) -> tuple[str, list[str]]:
    """Render images with their crop boundaries and numbers of tokens.

    Args:
      processor: Processor of the model.
      images: The images of one prompt.
      max_partition: Maximum number of cells per image.

    Returns:
      The HTML, and an error message for each image that the model cannot read.
    """
    figures: list[str] = []
    problems: list[str] = []
    total = 0
    for number, image in enumerate(images, 1):
        try:
            layout = processor.image_layout(image, max_partition)
            drawing = draw_crop_grid(image, layout.grid)
        except ImageError as error:
            problems.append(str(error))
            continue
        total += layout.num_tokens
        figures.append(
            f'<figure><img src="{_data_url(drawing)}" alt="picture {number} with its crops">'
            f"<figcaption>{_caption(image, layout)}</figcaption></figure>"
        )
    if not figures:
        return NO_IMAGES_HTML, problems
    count = "1 picture" if len(figures) == 1 else f"{len(figures)} pictures"
    summary = (
        f'<p class="sum">{count}: <b><span id="tokens">{total:,}</span> tokens</b> of the '
        f"{processor.config.multimodal_max_length:,} that fit into a prompt</p>"
    )
    return f"{summary}<div class='pictures'>{''.join(figures)}</div>", problems


def draw_crop_grid(image: Image.Image, grid: Grid) -> Image.Image:
    """Draw the crop boundaries on an image, which is converted to RGB as for the model.

    All drawings have the same size, so the lines are equally thick on all images.

    Raises:
      ImageError: The image cannot be converted to RGB.
    """
    scale = LONGER_SIDE / max(image.size)
    width, height = (max(MIN_SHORTER_SIDE, round(length * scale)) for length in image.size)
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    drawing = convert_to_rgb(image).resize((width, height), resampling)
    draw = ImageDraw.Draw(drawing)
    x, y = width / image.width, height / image.height
    boxes = [
        (left * x, upper * y, right * x - 1, lower * y - 1)
        for left, upper, right, lower in grid_boxes(*image.size, grid)
    ]
    for color, extra in ((OUTLINE_COLOR, 5), (LINE_COLOR, 2)):
        for left, upper, right, lower in boxes:
            box = (left - extra, upper - extra, right + extra, lower + extra)
            draw.rectangle(box, outline=color, width=2 * extra)
    return drawing


def _caption(image: Image.Image, layout: ImageLayout) -> str:
    rows, columns = layout.grid
    if len(layout.boxes) == 1:
        crops = "1 crop"
    else:
        crops = f"{len(layout.boxes)} crops: {rows} × {columns} cells and the full picture"
    pixels = f"{image.width} × {image.height} pixels"
    return f"<b>{layout.num_tokens:,} tokens</b> · {crops} · {pixels}"


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
