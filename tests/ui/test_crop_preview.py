"""Previews of images: the crop boundaries, and the number of tokens."""

import numpy as np
import pytest
from PIL import Image

from ovis_jax.errors import ImageError
from ovis_jax.ui.crop_preview import (
    LONGER_SIDE,
    MIN_SHORTER_SIDE,
    NO_IMAGES_HTML,
    draw_crop_grid,
    render_crop_previews,
)


@pytest.mark.parametrize("size", [(84, 84), (168, 84), (84, 200), (500, 400)])
@pytest.mark.parametrize("max_partition", [1, 4, 9])
def test_counts_are_those_of_the_prompt(ovis, size, max_partition):
    image = Image.new("RGB", size)
    example = ovis.processor.encode("Who?", [image], max_partition=max_partition)
    preview, problems = render_crop_previews(ovis.processor, [image], max_partition)
    num_tokens, num_crops = np.count_nonzero(example.tokens <= -300), len(example.pixels)
    assert f"<b>{num_tokens:,} tokens</b> · {num_crops} crop" in preview and not problems


def test_total_is_that_of_all_images(ovis):
    images = [Image.new("RGB", size) for size in ((84, 84), (168, 84))]
    example = ovis.processor.encode("Who?", images)
    preview, _ = render_crop_previews(ovis.processor, images, 9)
    total = np.count_nonzero(example.tokens <= -300)
    assert f'2 pictures: <b><span id="tokens">{total:,}</span>' in preview


def test_lines_are_at_the_crop_boundaries():
    grey = (120, 120, 120)
    drawing = np.asarray(draw_crop_grid(Image.new("RGB", (320, 160), grey), (2, 4)))
    assert drawing.shape == (LONGER_SIDE // 2, LONGER_SIDE, 3)
    line = np.flatnonzero((drawing[40] == 255).all(axis=-1))
    expected = [0, 160, 320, 480, LONGER_SIDE - 1]
    assert all(min(abs(line - edge)) <= 1 for edge in expected)
    assert all(min(abs(column - edge) for edge in expected) <= 3 for column in line)
    line = np.flatnonzero((drawing[:, 40] == 255).all(axis=-1))
    assert len(line) and all(min(abs(row - edge) for edge in (0, 160, 319)) <= 3 for row in line)
    assert (drawing[80, 80] == grey).all()  # nothing is drawn inside a cell


def test_long_and_small_images_are_drawn():
    assert min(draw_crop_grid(Image.new("RGB", (2000, 3)), (1, 4)).size) == MIN_SHORTER_SIDE
    assert draw_crop_grid(Image.new("RGBA", (1, 1), "red"), (1, 1)).mode == "RGB"


def test_unreadable_images_are_reported(ovis):
    no_rgb = Image.new("La", (9, 9))
    with pytest.raises(ImageError, match="mode La has no RGB form"):
        draw_crop_grid(no_rgb, (1, 1))
    preview, (problem,) = render_crop_previews(ovis.processor, [no_rgb], 9)
    assert preview == NO_IMAGES_HTML and "mode La" in problem
