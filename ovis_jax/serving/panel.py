"""What stands beside and below the chat, as HTML: how pictures are cut, and what an answer took."""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from ovis_jax.answering import Answer
from ovis_jax.errors import ImageError
from ovis_jax.inputs.processor import Processor
from ovis_jax.serving.crops import Cut, cut, draw_grid

NO_PICTURES = (
    '<p class="quiet">A picture that you attach appears here with the lines that the model cuts '
    "it along, and with the number of tokens it takes.</p>"
)


def pictures(
    processor: Processor, images: Sequence[Image.Image], max_partition: int
) -> tuple[str, list[str]]:
    """The pictures with their grids and token counts; and what is wrong with some, if anything.

    The counts are those of `processor`, for a prompt with these images.
    """
    figures: list[str] = []
    faults: list[str] = []
    total = 0
    for number, image in enumerate(images, 1):
        try:
            found = cut(processor, image, max_partition)
            drawing = draw_grid(image, found.grid)
        except ImageError as error:
            faults.append(str(error))
            continue
        total += found.positions
        figures.append(
            f'<figure><img src="{_data_url(drawing)}" alt="picture {number} with its crops">'
            f"<figcaption>{_caption(image, found)}</figcaption></figure>"
        )
    if not figures:
        return NO_PICTURES, faults
    limit = processor.config.multimodal_max_length
    what = "1 picture" if len(figures) == 1 else f"{len(figures)} pictures"
    sum_of_all = (
        f'<p class="sum">{what}: <b><span id="tokens">{total:,}</span> tokens</b> '
        f"of the {limit:,} that the model reads</p>"
    )
    return f"{sum_of_all}<div class='pictures'>{''.join(figures)}</div>", faults


def progress(answer: Answer, ending: str = "") -> str:
    """What an answer has taken so far, after the words of how it ended."""
    count = len(answer.tokens)
    parts = [
        f"{answer.prompt_positions:,} tokens read",
        f"{count:,} written",
        f"{answer.seconds_to_first_token:.1f} s to the first, {answer.seconds:.1f} s in all",
    ]
    if answer.finish_reason == "length":
        parts.append("cut off at the longest answer that you allow")
    return note(ending + " · ".join(parts))


def note(text: str) -> str:
    """One line below the chat."""
    return f'<p class="note">{escape(text)}</p>'


def _caption(image: Image.Image, found: Cut) -> str:
    rows, columns = found.grid
    pixels = f"{image.width} × {image.height} pixels"
    if found.crops == 1:
        way = "seen whole, 1 crop"
    else:
        way = f"{rows} × {columns} cells and the whole: {found.crops} crops"
    return f"<b>{found.positions:,} tokens</b> · {way} · {pixels}"


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
