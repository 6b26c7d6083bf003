"""Image files of strangers: few formats, and a look at the size before anything is decoded."""

import io

from PIL import Image

from ovis_jax.errors import ImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What is decoded; Pillow knows many more, some of which start other programs."""

MAX_PIXELS = 100_000_000
"""Of what is decoded for one question, unless a server is told otherwise."""

BROKEN = f"the bytes are not a whole image ({', '.join(FORMATS)} are read)"


class TooManyPixels(ImageError):
    """Images that are larger than they may be."""


def open_header(data: bytes) -> Image.Image:
    """Open an image file, of which nothing is decoded but its size.

    Raises:
      TooManyPixels: it is larger than Pillow takes.
      ImageError: it is no image, or of a format that is not read here.
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooManyPixels("the image has far more pixels than are read") from None
    # Each of Pillow's decoders raises what its parser happens to raise on a damaged file.
    except Exception:
        raise ImageError(BROKEN) from None


def add_pixels(before: int, image: Image.Image, max_pixels: int) -> int:
    """The pixels of an image and of those before it.

    Raises:
      TooManyPixels: they are more than `max_pixels`.
    """
    pixels = before + image.width * image.height
    if pixels > max_pixels:
        with_others = ", with the images before it" if before else ""
        raise TooManyPixels(
            f"the image is {image.width} x {image.height}{with_others}, more than "
            f"{max_pixels} pixels"
        )
    return pixels


def decode(image: Image.Image) -> None:
    """Decode an image that was opened.

    Raises:
      ImageError: it is broken.
    """
    try:
        image.load()
    except Exception:  # as above
        raise ImageError(BROKEN) from None
