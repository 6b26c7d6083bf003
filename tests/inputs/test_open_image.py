import base64
import io
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ovis_jax.errors import ImageError
from ovis_jax.inputs.open_image import (
    TooManyPixelsError,
    add_image_pixels,
    decode_data_url,
    decode_image,
    list_images,
    open_image,
    open_image_header,
)

WIDE = Path(__file__).parents[1] / "golden" / "images" / "wide.png"
DATA = WIDE.read_bytes()
URL = f"data:image/png;base64,{base64.b64encode(DATA).decode()}"


def encode(image, file_format):
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()


@pytest.mark.parametrize("source", [str(WIDE), WIDE, DATA, URL, Image.open(WIDE)])
def test_every_kind_of_source_gives_the_same_pixels(source):
    np.testing.assert_array_equal(np.asarray(open_image(source)), np.asarray(Image.open(WIDE)))


@pytest.mark.parametrize("shape, mode", [((2, 3), "L"), ((2, 3, 3), "RGB"), ((2, 3, 4), "RGBA")])
def test_arrays(shape, mode):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    image = open_image(array)
    assert image.mode == mode and image.size == (3, 2)
    np.testing.assert_array_equal(np.asarray(image), array)
    assert open_image(jnp.asarray(array)) == image


@pytest.mark.parametrize(
    "source, message",
    [
        ("none.png", "none.png cannot be read"),
        (b"text", "image 2 cannot be decoded as an image: Pillow does not recognize its format"),
        (DATA[: len(DATA) // 2], "image 2 cannot be decoded as an image: "),
        ("https://example.org/a.png", "https://example.org/a.png is a URL"),
        ("data:image/png;base64", "needs a comma"),
        ("data:image/png;base64,%", "base64"),
        ("data:,hello", "not a complete image"),
        (3, "image 2 has type int, expected a path"),
        (
            [DATA],
            "image 2 has type list, expected a path.*; lists of images belong to a list of pr",
        ),
        (
            np.zeros((2, 3, 3), np.float32),
            r"image 2 is an array of dtype float32 and shape \[2, 3, 3\]",
        ),
        (
            np.zeros((1, 2, 3, 3), np.uint8),
            r"an array of dtype uint8 and shape \[1, 2, 3, 3\], expect",
        ),
        (np.zeros((0, 3, 3), np.uint8), r"shape \[0, 3, 3\], which has no pixels"),
    ],
)
def test_invalid_sources(source, message):
    with pytest.raises(ImageError, match=message):
        open_image(source, "image 2")


def test_files_are_named(tmp_path):
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ImageError, match=r"text\.png cannot be decoded"):
        open_image(tmp_path / "text.png")


def test_one_image_or_a_list():
    assert list_images(None) == ()
    assert list_images("a.png") == ("a.png",)
    array = jnp.zeros((2, 3))
    assert list_images(array) == (array,)
    assert list_images(["a.png", "b.png"]) == ["a.png", "b.png"]
    with pytest.raises(
        ImageError, match="images of prompts.2. have type int, expected a path.* list"
    ):
        list_images(3, "prompts[2]")  # pyright: ignore


@pytest.mark.parametrize("limit", [1000, 4000])
def test_decompression_bombs(monkeypatch, limit):
    # Pillow raises above twice its limit and warns above it; in tests a warning is an error.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    data = encode(Image.new("RGB", (70, 70)), "PNG")
    with pytest.raises(ImageError, match="bomb"):
        open_image(data)
    with pytest.raises(TooManyPixelsError, match="far more pixels"):
        open_image_header(data)


def test_untrusted_images_are_decoded_after_the_pixel_count():
    image = open_image_header(DATA)
    assert (
        add_image_pixels(5, image, 5 + image.width * image.height) == 5 + image.width * image.height
    )
    size = f"{image.width} x {image.height}"
    with pytest.raises(
        TooManyPixelsError, match=f"{size}, with the images before it, more than 5 "
    ):
        add_image_pixels(5, image, 5)
    with pytest.raises(TooManyPixelsError, match=f"{size}, more than 5 pixels"):
        add_image_pixels(0, image, 5)
    decode_image(image)
    damaged = open_image_header(DATA[: len(DATA) // 2])
    with pytest.raises(ImageError, match="not a complete image"):
        decode_image(damaged)


@pytest.mark.parametrize("file_format", ["TIFF", "PPM", "ICO"])
def test_untrusted_formats(file_format):
    data = encode(Image.new("RGB", (70, 70)), file_format)
    assert open_image(data).mode in ("RGB", "RGBA")
    with pytest.raises(ImageError, match="supported formats: PNG, JPEG, WEBP, GIF, BMP"):
        open_image_header(data)
    with pytest.raises(ImageError, match="supported formats"):
        open_image(f"data:;base64,{base64.b64encode(data).decode()}")


def test_data_urls():
    assert decode_data_url("data:;base64,aGk=") == decode_data_url("data:;base64,aGk%3D") == b"hi"
    assert decode_data_url("data:text/plain,h%69") == b"hi"
