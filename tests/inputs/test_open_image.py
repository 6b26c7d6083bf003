import base64
import io
import itertools
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

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
    is_data_url,
    list_images,
    open_image,
    open_image_header,
    unquote_bytes,
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
    np.testing.assert_array_equal(np.asarray(decode_image(image)), np.asarray(open_image(DATA)))
    damaged = open_image_header(DATA[: len(DATA) // 2])
    with pytest.raises(ImageError, match="not a complete image"):
        decode_image(damaged)


@pytest.mark.parametrize("file_format", ["TIFF", "PPM", "ICO"])
def test_untrusted_formats(file_format):
    data = encode(Image.new("RGB", (70, 70)), file_format)
    assert open_image(data).mode == "RGB"
    with pytest.raises(ImageError, match="supported formats: PNG, JPEG, WEBP, GIF, BMP"):
        open_image_header(data)
    with pytest.raises(ImageError, match="supported formats"):
        open_image(f"data:;base64,{base64.b64encode(data).decode()}")


@pytest.mark.parametrize(
    "url",
    [
        "data:;base64,aGk=",
        "data:;base64,aGk",
        "data:image/png;base64,aGk=\n",
        "data:image/png;base64,\r\n aG\r\n\tk=\f",
        "data:image/png;base64, a G k = ",
        "data:image/png; base64,aGk=",
        "data:image/png;  BASE64 ,aGk",
        "DATA:IMAGE/PNG;BASE64,aGk=",
        " data:image/png;base64,aGk=",
        "data:image/png;name=a.png;base64,aGk=",
        "data:;base64,aGk%3D",
        "data:;base64,aG%0Ak%3D",
        "data:base64;base64,aGk",
        "data:text/plain,h%69",
        "data:,hi",
        "data:base64,hi",
    ],
)
def test_data_urls_are_read_as_browsers_read_them(url):
    assert is_data_url(url)
    assert decode_data_url(url) == b"hi"


def test_quoted_bytes_equal_those_of_urllib():
    tails = ["".join(tail) for n in range(7) for tail in itertools.product("%4Fg", repeat=n)]
    found = [unquote_bytes(tail.encode()) for tail in tails]
    assert found == [unquote_to_bytes(tail) for tail in tails]


@pytest.mark.parametrize("body", ["a", "aGk==", "aGk===", "aG=k", "=", "aG-_", "aGk=é", "a\0Gk"])
def test_invalid_base64(body):
    with pytest.raises(ImageError, match="does not contain valid base64"):
        decode_data_url(f"data:image/png;base64,{body}")


def test_base64_with_line_breaks_and_quoted_characters():
    text = base64.encodebytes(DATA).decode()
    assert text.count("\n") > 20
    expected = np.asarray(open_image(DATA))
    for body in (text, text.rstrip("=\n"), quote(text), quote(text, safe="/+")):
        image = open_image(f"data:image/png; base64,{body}")
        np.testing.assert_array_equal(np.asarray(image), expected)
    quoted = open_image(f"data:image/png,{quote(DATA)}")
    np.testing.assert_array_equal(np.asarray(quoted), expected)


def test_file_urls(tmp_path):
    path = tmp_path / "my 50% picture #1.png"
    path.write_bytes(DATA)
    for url in (path.as_uri(), path.as_uri().replace("file://", "file://localhost")):
        np.testing.assert_array_equal(np.asarray(open_image(url)), np.asarray(open_image(DATA)))
    with pytest.raises(ImageError, match="file://host/a.png cannot be read: .*another machine"):
        open_image("file://host/a.png")


@pytest.mark.parametrize("name", ["rgba", "palette", "wide"])
def test_the_exact_reading_is_pillow_s_conversion(name):
    path = WIDE.with_name(f"{name}.png")
    url = f"data:;base64,{base64.b64encode(path.read_bytes()).decode()}"
    for source in (path, str(path), path.read_bytes(), url):
        image = open_image(source, exact=True)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(
            np.asarray(image), np.asarray(Image.open(path).convert("RGB"))
        )
