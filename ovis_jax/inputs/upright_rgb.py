"""Reading an image file as people see it: upright, with 8 bits per channel, and on white.

The original reads every file with Pillow's `convert("RGB")` (`image_processing.convert_to_rgb`).
This conversion ignores the EXIF orientation, clips 16-bit values at 255, and drops the alpha
channel, so black text on a transparent background becomes black on black.
"""

import math

import numpy as np
from PIL import ExifTags, Image

from ovis_jax.errors import ImageError
from ovis_jax.inputs.image_processing import convert_to_rgb

TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns an image upright, by the image's EXIF orientation."""

TURNED_ORIENTATIONS = (5, 6, 7, 8)
"""The EXIF orientations that swap the width and the height."""

WHITE_IS_ZERO = 0
"""The value of a TIFF file's PhotometricInterpretation if 0 is white."""


def to_upright_rgb(image: Image.Image, *, max_exif_bytes: float = math.inf) -> Image.Image:
    """Decode an image that Pillow opened, and convert it to upright 8-bit RGB on white.

    Pixels with 12 or 16 bits keep their upper 8 bits, as in Pillow's own conversion of 16-bit RGB.

    Args:
      image: The image.
      max_exif_bytes: Maximum size of the EXIF data. Pillow copies the value of each tag, and the
        values may overlap, so the copies can have up to size**2 / 48 bytes in total.

    Raises:
      ImageError: The pixels are signed or 32-bit numbers, the image cannot be converted to RGB, or
        it has too much EXIF data. Pillow's decoders may raise any exception for a damaged file.
    """
    _scale_transparent_color(image)
    image.load()
    exif_bytes = len(image.info.get("exif") or b"")
    # A PNG file may also have it as text, in hexadecimal digits.
    exif_bytes = exif_bytes or len(image.info.get("Raw profile type exif") or "") // 2
    if exif_bytes > max_exif_bytes:
        raise ImageError(
            f"the image has {exif_bytes} bytes of EXIF data, expected at most {max_exif_bytes};"
            " save it without its metadata"
        )
    # ImageOps.exif_transpose would also write the EXIF data again, which fails if it is damaged.
    orientation = read_orientation(image)
    if image.mode.startswith(("I", "F")):
        image = _gray_from_numbers(image)
    if image.has_transparency_data:
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer)
    image = convert_to_rgb(image)
    if orientation in TRANSPOSITIONS:
        image = image.transpose(TRANSPOSITIONS[orientation])
        image.info.clear()  # it still contains the orientation
    return image


def read_orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation of an image without decoding it; None if it is not stated."""
    try:
        # `PngImageFile.getexif` would decode the image.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data
        return None


def _scale_transparent_color(image: Image.Image) -> None:
    """Scale the transparent color of a PNG file to 8 bits, as Pillow scales the pixels."""
    key, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    mode = tiles[0][3] if tiles else None
    if mode in ("L;2", "L;4") and isinstance(key, int):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[mode]
    elif mode == "RGB;16B" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _gray_from_numbers(image: Image.Image) -> Image.Image:
    """Convert 12-bit or 16-bit pixels to 8 bits, with alpha if one value is transparent."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # only TIFF files have tags
    bits = max(tags.get(ExifTags.Base.BitsPerSample, (16,)))
    if image.mode == "F" or bits > 16 or np.any((values < 0) | (values >= 2**bits)):
        raise ImageError(
            f"the pixels are signed or 32-bit numbers (mode {image.mode}), and the file does not "
            "say which of them are black and white; save the image with 8 or 16 bits per channel"
        )
    eight_bits = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_ZERO:
        eight_bits = 255 - eight_bits  # Pillow inverts pixels of at most 8 bits itself
    gray = Image.fromarray(eight_bits)
    if (key := image.info.get("transparency")) is not None:
        gray.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return gray
