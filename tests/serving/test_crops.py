"""The grid over an image, and what the image costs."""

import numpy as np
import pytest
from PIL import Image

import ovis_jax
from ovis_jax.errors import ImageError
from ovis_jax.inputs.image import crops
from ovis_jax.serving.crops import LONGEST, cut, draw_grid


@pytest.fixture(scope="module")
def processor():
    return ovis_jax.load("ovis-tiny").processor


@pytest.mark.parametrize("size", [(84, 84), (168, 84), (84, 200), (500, 400)])
@pytest.mark.parametrize("max_partition", [1, 4, 9])
def test_the_cost_is_that_of_the_prompt(processor, size, max_partition):
    image = Image.new("RGB", size)
    found = cut(processor, image, max_partition)
    tokens = processor(["Who?"], [[image]], max_partition=max_partition).tokens
    assert found.positions == np.count_nonzero(tokens <= -300)
    pixels, grid = crops(image, processor.image_settings, max_partition)
    assert (found.crops, found.grid) == (len(pixels), grid)


def test_the_lines_stand_where_the_crops_fall():
    grey = (120, 120, 120)
    drawing = np.asarray(draw_grid(Image.new("RGB", (320, 160), grey), (2, 4)))
    assert drawing.shape == (LONGEST // 2, LONGEST, 3)
    line = np.flatnonzero((drawing[40] == 255).all(axis=-1))
    expected = [0, 160, 320, 480, LONGEST - 1]
    assert [int(min(abs(line - edge))) <= 1 for edge in expected] == [True] * 5
    assert all(min(abs(column - edge) for edge in expected) <= 3 for column in line)
    line = np.flatnonzero((drawing[:, 40] == 255).all(axis=-1))
    assert all(min(abs(row - edge) for edge in (0, 160, 319)) <= 3 for row in line)
    assert (drawing[80, 80] == grey).all()  # inside a cell the picture is left alone


def test_long_and_small_images_are_drawn():
    assert min(draw_grid(Image.new("RGB", (2000, 3)), (1, 4)).size) >= 40
    assert draw_grid(Image.new("RGBA", (1, 1), "red"), (1, 1)).mode == "RGB"


def test_what_is_not_an_image_of_this_model_is_an_image_error(processor):
    with pytest.raises(ImageError, match="no RGB form"):
        draw_grid(Image.new("La", (9, 9)), (1, 1))
    with pytest.raises(ImageError, match="max_partition"):
        cut(processor, Image.new("RGB", (9, 9)), 0)
