"""Image files are read as people see them, and exactly as the original reads them on request."""

import io
import re

import numpy as np
import pytest
from image_files import (
    INVERSE,
    add_exif_at_the_end,
    encode,
    exif_orientation,
    gray_tiff_file,
    png_file,
)
from PIL import Image, ImageFile, ImageOps

from ovis_jax.errors import ImageError
from ovis_jax.inputs.open_image import open_image, read_image_size
from ovis_jax.inputs.upright_rgb import TRANSPOSITIONS

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8))
PIXELS = np.asarray(PHOTO)
RAMP = np.arange(65536).reshape(256, 256)
SHAPE = np.random.default_rng(1).integers(0, 2, (6, 10)).astype(bool)
"""True where the pictures on a transparent background are black."""
BLACK_ON_WHITE = np.repeat(np.where(SHAPE, 0, 255)[..., None], 3, axis=-1)


def read(data: bytes, **options) -> np.ndarray:
    image = open_image(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def turned(orientation: int) -> Image.Image:
    """The photo as stored by a camera that was held in another orientation."""
    inverse = INVERSE[orientation]
    return PHOTO.transpose(TRANSPOSITIONS[inverse]) if inverse > 1 else PHOTO


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_photos_are_turned_upright(orientation, file_format):
    stored, exif = turned(orientation), exif_orientation(orientation)
    data = encode(stored, file_format, exif=exif, lossless=True)
    np.testing.assert_array_equal(read(data), PIXELS)
    np.testing.assert_array_equal(read(data, exact=True), np.asarray(stored))
    assert ImageOps.exif_transpose(open_image(data)).size == PHOTO.size  # nothing turns it again
    np.testing.assert_array_equal(
        read(encode(stored, "JPEG", exif=exif)),
        read(encode(stored, "JPEG"))
        if orientation == 1
        else np.asarray(open_image(encode(stored, "JPEG")).transpose(TRANSPOSITIONS[orientation])),
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiff_files_are_turned_once(orientation, compression):
    tags = {0x0112: orientation}
    data = encode(turned(orientation), "TIFF", tiffinfo=tags, compression=compression)
    np.testing.assert_array_equal(read(data), PIXELS)
    np.testing.assert_array_equal(read(data, exact=True), PIXELS)  # Pillow turns these itself


def test_an_orientation_after_the_pixels():
    data = add_exif_at_the_end(encode(turned(6)), 6)
    np.testing.assert_array_equal(read(data), PIXELS)
    assert read_image_size(data) == PHOTO.size
    assert read_image_size(data, exact=True) == PHOTO.size[::-1]


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "MPO", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("exact", [False, True])
def test_sizes_are_those_of_the_decoded_image(
    orientation, file_format, exact, monkeypatch, tmp_path
):
    options = {} if orientation is None else {"exif": exif_orientation(orientation)}
    data = encode(turned(orientation or 1), file_format, **options)
    expected = open_image(data, exact=exact).size
    (tmp_path / "photo").write_bytes(data)
    if file_format != "TIFF":  # these are decoded
        monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert read_image_size(data, exact=exact) == expected
    assert read_image_size(str(tmp_path / "photo"), exact=exact) == expected


def test_sizes_of_files_that_cannot_be_read(tmp_path):
    for source in (b"no picture", str(tmp_path / "none.png")):
        with pytest.raises(ImageError) as expected:
            open_image(source, "image 1")
        with pytest.raises(ImageError, match=re.escape(str(expected.value))):
            read_image_size(source, "image 1")
    assert read_image_size(PHOTO) == read_image_size(PIXELS) == PHOTO.size


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_is_ignored():
    data = encode(PHOTO, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09rest")
    np.testing.assert_array_equal(read(data), read(encode(PHOTO, "JPEG")))
    data = encode(PHOTO, "JPEG", exif=b"Exif\0\0no exif data")
    np.testing.assert_array_equal(read(data), read(encode(PHOTO, "JPEG")))


@pytest.mark.parametrize(
    "data",
    [
        png_file(RAMP, 16),
        encode(Image.fromarray(RAMP.astype(np.uint16)), "TIFF"),
        encode(Image.fromarray(RAMP.astype(np.uint16)), "TIFF", compression="tiff_lzw"),
        b"P5 256 256 65535\n" + RAMP.astype(">u2").tobytes(),
        png_file(np.stack([RAMP] * 3, axis=-1), 16),
    ],
    ids=["png", "tiff", "tiff_lzw", "pgm", "rgb"],
)
def test_16_bits_are_scaled_to_8(data):
    np.testing.assert_array_equal(read(data), np.stack([RAMP >> 8] * 3, axis=-1))


def test_12_bits_are_scaled_to_8():
    data = gray_tiff_file(RAMP >> 4, 12)
    np.testing.assert_array_equal(read(data), np.stack([RAMP >> 8] * 3, axis=-1))


def test_tiff_files_in_which_zero_is_white():
    """Pillow inverts them if they have 8 bits, but not if they have 16."""
    assert Image.open(io.BytesIO(gray_tiff_file(RAMP, 16))).getpixel((9, 0)) == 9
    data = gray_tiff_file(RAMP, 16, white_is_zero=True)
    np.testing.assert_array_equal(read(data), 255 - np.stack([RAMP >> 8] * 3, axis=-1))


def test_the_original_clips_16_bits():
    """Of 65,536 values, all but the first 256 become white."""
    clipped = np.stack([np.minimum(RAMP, 255)] * 3, axis=-1)
    np.testing.assert_array_equal(read(png_file(RAMP, 16), exact=True), clipped)


def gray_with_alpha(mode: str) -> Image.Image:
    image = Image.new(mode, SHAPE.shape[::-1], 0)
    image.putalpha(Image.fromarray((SHAPE * 255).astype(np.uint8)))
    return image


def palette(transparency: int | bytes) -> bytes:
    """Palette index 0 is opaque black, and index 1 is transparent black."""
    image = Image.fromarray((~SHAPE).astype(np.uint8)).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([0, 0, 0] * 2)
    return encode(image, transparency=transparency)


@pytest.mark.parametrize(
    "data",
    [
        encode(gray_with_alpha("RGB")),
        encode(gray_with_alpha("L")),
        encode(gray_with_alpha("RGB"), "WEBP", lossless=True, exact=True),
        encode(gray_with_alpha("RGB"), "TIFF"),
        palette(1),
        palette(b"\xff\0"),
        png_file(np.where(SHAPE, 0, 1), 1, transparent=(1,)),
        png_file(np.where(SHAPE, 0, 2), 2, transparent=(2,)),
        png_file(np.where(SHAPE, 0, 9), 4, transparent=(9,)),
        png_file(np.where(SHAPE, 0, 77), 8, transparent=(77,)),
        png_file(np.where(SHAPE, 0, 7777), 16, transparent=(7777,)),
        png_file(np.where(SHAPE[..., None], 0, [1, 2, 3]), 8, transparent=(1, 2, 3)),
        png_file(np.where(SHAPE[..., None], 0, [99, 999, 9999]), 16, transparent=(99, 999, 9999)),
        png_file(np.stack([0 * SHAPE, SHAPE * 65535], axis=-1), 16),
        png_file(np.stack([*[0 * SHAPE] * 3, SHAPE * 65535], axis=-1), 16),
    ],
    ids=[
        *["RGBA", "LA", "WebP", "TIFF", "palette index", "palette alpha"],
        *["1 bit", "2 bits", "4 bits", "8 bits", "16 bits", "RGB", "16-bit RGB"],
        *["16-bit LA", "16-bit RGBA"],
    ],
)
def test_transparent_pixels_are_white(data):
    """The original drops the alpha channel, so black text on black remains."""
    np.testing.assert_array_equal(read(data), BLACK_ON_WHITE)
    assert read(data, exact=True).min() == 0
    np.testing.assert_array_equal(
        read(data, exact=True), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    )


def test_translucent_pixels_are_mixed_with_white():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 0), (255, 0, 0, 255), (200, 0, 0, 51)])
    np.testing.assert_array_equal(
        read(encode(image)), [[[255, 255, 255], [255, 0, 0], [244, 204, 204]]]
    )


def test_an_opaque_alpha_channel_changes_nothing():
    opaque = PHOTO.copy()
    opaque.putalpha(255)
    np.testing.assert_array_equal(read(encode(opaque)), PIXELS)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_modes_equal_the_original(mode):
    data = encode(PHOTO.convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    np.testing.assert_array_equal(read(data), read(data, exact=True))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_have_no_black_and_white(mode):
    image = Image.new(mode, (4, 4), 100)
    message = rf"picture 1.*32-bit numbers \(mode {mode}\).*save the image with 8 or 16 bits"
    with pytest.raises(ImageError, match=message):
        open_image(encode(image, "TIFF"), "picture 1")
    assert (read(encode(image, "TIFF"), exact=True) == 100).all()


@pytest.mark.parametrize("value", [-1, 65536])
def test_values_beyond_16_bits(value):
    with pytest.raises(ImageError, match="32-bit numbers"):
        open_image(encode(Image.new("I", (4, 4), value), "IM"))


def test_images_and_arrays_are_taken_as_they_are():
    image = Image.open(io.BytesIO(encode(turned(6), exif=exif_orientation(6))))
    assert open_image(image) is image
    array = np.zeros((2, 3, 4), np.uint8)
    assert open_image(array).mode == "RGBA"
