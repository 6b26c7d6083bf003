"""Opening images: files, bytes, data URLs and arrays are converted to Pillow images.

Files are read as people see them, upright and on white, or exactly as the original reads them;
`open_image` describes both ways. `open_image` is for trusted images. For untrusted images, call
`open_image_header`, `add_image_pixels` and `decode_image` in this order: they accept only common
formats, and the number of pixels is checked before anything is decoded.
"""

import base64
import binascii
import contextlib
import io
import math
import os
import re
from collections.abc import Sequence
from typing import IO, Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image, UnidentifiedImageError

from ovis_jax.errors import ImageError
from ovis_jax.inputs.image_processing import ImageSize, convert_to_rgb
from ovis_jax.inputs.unsupported_image_formats import (
    describe_unsupported_format,
    is_camera_raw,
    register_heic_plugin,
)
from ovis_jax.inputs.upright_rgb import TURNED_ORIENTATIONS, read_orientation, to_upright_rgb


@runtime_checkable
class SupportsArray(Protocol):
    """An array that numpy can convert, such as a JAX array. This module does not import JAX."""

    def __array__(self) -> np.ndarray:
        """Return the array in host memory."""
        ...


ImageSource = str | os.PathLike[str] | bytes | Image.Image | SupportsArray
"""The forms in which users can pass an image; `open_image` describes each form."""
IMAGE_TYPES = os.PathLike | bytes | Image.Image | SupportsArray
"""The types in `ImageSource`, except for str."""

UNTRUSTED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""The formats accepted from untrusted sources. Pillow reads more formats, some of them with
external programs."""

HEADER_FORMATS = (*UNTRUSTED_FORMATS, "MPO")
"""The formats whose decoder never changes the size that the header states."""

DEFAULT_MAX_PIXELS = 100_000_000
"""Default maximum for the total number of pixels in the images of one untrusted request."""

DEFAULT_MAX_IMAGE_PIXELS = 52_000_000
"""Default maximum for the number of pixels in one untrusted image, enough for 8192 x 6144."""

MAX_EXIF_BYTES = 2**17
"""Maximum size of the EXIF data of an untrusted image, in bytes. A JPEG file normally has at most
half as much."""

MAX_JPEG_SCANS = 64
"""Maximum number of scans of an untrusted JPEG file. Progressive files normally have about 10.
Decoding a scan of a few bytes takes as long as decoding any other scan."""

MAX_READS = 2**18
"""Maximum number of reads from an untrusted image file."""

_JPEG_EXIF = re.compile(rb"\xff\xe1(..)Exif\0\0", re.DOTALL)

_HEX_DIGITS = np.full(256, 16, np.uint8)
"""The value of each hexadecimal digit, by its character code; 16 for other characters."""
for _value, _digit in enumerate("0123456789abcdef"):
    _HEX_DIGITS[[ord(_digit), ord(_digit.upper())]] = _value

_EXPECTED = "expected a path, the bytes of an image file, a data: URL, a PIL image or a uint8 array"
_SUPPORTED = f"(supported formats: {', '.join(UNTRUSTED_FORMATS)})"
_BROKEN = f"the bytes are not a complete image {_SUPPORTED}"


class TooManyPixelsError(ImageError):
    """An image exceeds a pixel limit, alone or together with the other images of a request."""


class _LimitedFile(io.BytesIO):
    """An image file in memory that can be read `MAX_READS` times.

    Pillow parses the segments of JPEG, the chunks of PNG, the blocks of GIF and the runs of BMP
    files in Python. For a file with millions of such parts, this takes many seconds.
    """

    _num_reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._num_reads += 1
        if self._num_reads > MAX_READS:
            raise ImageError("the image file has too many parts; save it as PNG without metadata")
        return super().read(size)


def open_image(source: ImageSource, name: str = "the image", *, exact: bool = False) -> Image.Image:
    """Open an image.

    Files, bytes and data URLs are converted to RGB with 8 bits per channel. By default, they are
    read as people see them: upright according to the EXIF orientation, with 16-bit values scaled to
    8 bits, and with transparent pixels on white. PIL images and arrays are not changed.

    Args:
      source: The image, in one of these forms:
        - a path, str or `os.PathLike`, of a file in any format that Pillow reads, or of a HEIC
          file if pillow-heif is installed; a str may also be a `file://` URL;
        - the bytes of such a file;
        - a `data:` URL of a PNG, JPEG, WebP, GIF or BMP file;
        - a PIL image, which is returned unchanged;
        - a numpy or JAX uint8 array: [h, w] gray, [h, w, 3] RGB or [h, w, 4] RGBA.
      name: Name in error messages for an image that is not a file.
      exact: Whether to read files exactly as the original does: with Pillow's `convert("RGB")`,
        which ignores the orientation, clips 16-bit values at 255 and drops the alpha channel.

    Raises:
      ImageError: The file cannot be read or decoded, or it exceeds Pillow's pixel limit. The error
        is also raised if the source is an http(s) URL, has an unsupported type, or is an array with
        an unsupported shape or dtype. Camera raw files are rejected, too, and so are signed or
        32-bit pixels unless `exact` is set.
    """
    match source:
        case Image.Image():
            return source
        case SupportsArray():
            return _from_array(np.asarray(source), name)
        case bytes():
            return _decode(source, name, exact)
        case str() if is_data_url(source):
            return decode_image(open_image_header(decode_data_url(source)), exact=exact)
        case str() if source.startswith(("http://", "https://")):
            raise ImageError(
                f"{source} is a URL; images are not downloaded here, so save it and pass the path"
            )
        case str() | os.PathLike():
            try:
                with open(_path_of_file_url(source), "rb") as file:
                    data = file.read()
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise ImageError(f"{source} cannot be read: {reason}") from error
            return _decode(data, str(source), exact)
    is_list = isinstance(source, list | tuple)
    hint = "; lists of images belong to a list of prompts, one image list each" if is_list else ""
    raise ImageError(f"{name} has type {type(source).__name__}, {_EXPECTED}{hint}")


def read_image_size(
    source: ImageSource, name: str = "the image", *, exact: bool = False
) -> ImageSize:
    """Return the size of the image that `open_image` returns.

    For the usual formats, only the header of the file is read, so a damaged file may have a size.
    Other files are decoded.

    Raises:
      ImageError: As in `open_image`.
    """
    size = None
    if isinstance(source, str | bytes | os.PathLike):
        # If anything is unusual, `open_image` decodes the file or says what is wrong.
        with contextlib.suppress(Exception):
            if isinstance(source, bytes) or (isinstance(source, str) and is_data_url(source)):
                data = source if isinstance(source, bytes) else decode_data_url(source)
                file = io.BytesIO(data)
            else:
                file = open(_path_of_file_url(source), "rb")
            with file:
                size = _size_in_header(Image.open(file), file, exact)
    return size or ImageSize(*open_image(source, name, exact=exact).size)


def _size_in_header(image: Image.Image, file: IO[bytes], exact: bool) -> ImageSize | None:
    """Return the size of an opened image after decoding, or None if the header does not say."""
    if image.format not in HEADER_FORMATS:
        return None
    if exact:
        return ImageSize(*image.size)
    if image.format == "PNG" and "exif" not in image.info and _has_text_after_pixels(file):
        return None
    turned = read_orientation(image) in TURNED_ORIENTATIONS
    return ImageSize(*(reversed(image.size) if turned else image.size))


def _has_text_after_pixels(file: IO[bytes]) -> bool:
    """Return whether a PNG file has chunks after its pixels that may state an orientation."""
    file.seek(8)
    is_after = False
    while len(head := file.read(8)) == 8:
        kind = head[4:]
        if is_after and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return True
        is_after |= kind == b"IDAT"
        file.seek(int.from_bytes(head[:4]) + 4, os.SEEK_CUR)
    return False


def list_images(
    images: ImageSource | Sequence[ImageSource] | None, name: str = "the prompt"
) -> Sequence[ImageSource]:
    """Return images as a sequence; `images` may be one image, a sequence of images, or None.

    Raises:
      ImageError: `images` has an unsupported type.
    """
    if images is None:
        return ()
    if isinstance(images, str | IMAGE_TYPES):
        return (images,)
    if not isinstance(images, Sequence):
        raise ImageError(
            f"images of {name} have type {type(images).__name__}, {_EXPECTED}, or a list of these"
        )
    return images


def is_data_url(source: str) -> bool:
    """Return whether a string is a `data:` URL."""
    return source[:64].lstrip()[:5].lower() == "data:"


def decode_data_url(url: str) -> bytes:
    """Return the bytes that a `data:` URL contains.

    The URL is read as browsers read it (https://fetch.spec.whatwg.org/#data-urls): the media type
    may be missing, and base64 may contain white space and lack its padding.

    Raises:
      ImageError: The URL has no comma, or its base64 is invalid.
    """
    head, comma, body = url.lstrip()[len("data:") :].partition(",")
    if not comma:
        raise ImageError("a data: URL needs a comma before its data")
    try:
        data = unquote_bytes(body.encode()) if "%" in body else body.encode()
        if not re.search("; *base64$", head.strip(), re.IGNORECASE):
            return data
        data = data.translate(None, b"\t\n\f\r ")
        if len(data) % 4 == 0:
            data = data.removesuffix(b"=").removesuffix(b"=")
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ImageError("the data: URL does not contain valid base64") from None


def unquote_bytes(data: bytes) -> bytes:
    """Replace each percent sign and two hexadecimal digits by the byte that they encode.

    The result equals that of `urllib.parse.unquote_to_bytes`, which takes seconds and gigabytes for
    millions of percent signs.
    """
    values = np.frombuffer(data, np.uint8)
    digits = _HEX_DIGITS[values]
    is_escape = (values[:-2] == ord("%")) & (digits[1:-1] < 16) & (digits[2:] < 16)
    (places,) = np.nonzero(is_escape)
    decoded, kept = values.copy(), np.ones(len(values), bool)
    decoded[places] = 16 * digits[places + 1] + digits[places + 2]
    kept[places + 1] = kept[places + 2] = False
    return decoded[kept].tobytes()


def open_image_header(data: bytes) -> Image.Image:
    """Open an untrusted image file and read its size, without decoding the image.

    Raises:
      TooManyPixelsError: The image exceeds Pillow's pixel limit.
      ImageError: The bytes are not an image, the format is not in `UNTRUSTED_FORMATS`, or the file
        has too many parts or, if it is a JPEG file, too many scans or too much EXIF data.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    try:
        return Image.open(_LimitedFile(data), formats=UNTRUSTED_FORMATS)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooManyPixelsError("the image has far more pixels than are read") from None
    # Pillow's decoders may raise any exception for a damaged file.
    except Exception:
        kind, _, _ = (describe_unsupported_format(data) or "").partition(";")
        raise ImageError(f"the bytes are {kind} {_SUPPORTED}" if kind else _BROKEN) from None


def add_image_pixels(
    pixels: int,
    image: Image.Image,
    max_pixels: int,
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
) -> int:
    """Add an image's number of pixels to that of the previous images, and check the limits.

    Raises:
      TooManyPixelsError: The sum exceeds `max_pixels`, or the image exceeds `max_image_pixels`.
    """
    total = pixels + image.width * image.height
    if image.width * image.height > max_image_pixels:
        raise TooManyPixelsError(
            f"the image is {image.width} x {image.height}, more than {max_image_pixels} pixels"
        )
    if total > max_pixels:
        with_others = ", with the images before it" if pixels else ""
        raise TooManyPixelsError(
            f"the image is {image.width} x {image.height}{with_others}, more than "
            f"{max_pixels} pixels"
        )
    return total


def decode_image(image: Image.Image, *, exact: bool = False) -> Image.Image:
    """Decode an image that `open_image_header` opened, and convert it as `open_image` does.

    Raises:
      ImageError: The image file is damaged or has too many parts or too much EXIF data.
    """
    try:
        return _read_pixels(image, exact, max_exif_bytes=MAX_EXIF_BYTES)
    except ImageError:
        raise
    except Exception:  # see open_image_header
        raise ImageError(_BROKEN) from None


def _decode(data: bytes, name: str, exact: bool) -> Image.Image:
    """Decode a trusted image file; `name` is its name in error messages."""
    register_heic_plugin(data)
    try:
        if is_camera_raw(data):  # Pillow would read its preview
            raise UnidentifiedImageError
        return _read_pixels(Image.open(io.BytesIO(data)), exact)
    except UnidentifiedImageError as error:
        kind = describe_unsupported_format(data)
        raise ImageError(
            f"{name} is {kind}"
            if kind
            else f"{name} cannot be decoded as an image: Pillow does not recognize its format"
        ) from error
    except Exception as error:  # see open_image_header
        raise ImageError(f"{name} cannot be decoded as an image: {error}") from error


def _check_jpeg(data: bytes) -> None:
    """Check that a JPEG file cannot take very long to open and decode. Opening parses EXIF data.

    Raises:
      ImageError: The file has too many scans or too much EXIF data.
    """
    num_scans = data.count(b"\xff\xda")
    if num_scans > MAX_JPEG_SCANS:
        raise ImageError(
            f"the JPEG file has {num_scans} scans, expected at most {MAX_JPEG_SCANS}; save it again"
        )
    # Pillow joins all of these segments.
    num_bytes = sum(int.from_bytes(size) for size in _JPEG_EXIF.findall(data))
    if num_bytes > MAX_EXIF_BYTES:
        raise ImageError(
            f"the JPEG file has {num_bytes} bytes of EXIF data, expected at most {MAX_EXIF_BYTES};"
            " save it without its metadata"
        )


def _read_pixels(
    image: Image.Image, exact: bool, *, max_exif_bytes: float = math.inf
) -> Image.Image:
    """Decode an opened image, exactly as the original or as people see it (see `open_image`)."""
    if not exact:
        return to_upright_rgb(image, max_exif_bytes=max_exif_bytes)
    image.load()
    return convert_to_rgb(image)


def _path_of_file_url(source: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the path in a `file:` URL; other sources are returned unchanged.

    Raises:
      ValueError: The URL names another machine.
    """
    if not isinstance(source, str) or source[:6].lower() != "file:/":
        return source
    url = urlsplit(source)
    if url.netloc not in ("", "localhost"):
        raise ValueError(f"the file is on another machine, {url.netloc}")
    return unquote(url.path)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    shape = array.shape
    if array.dtype != np.uint8 or not (len(shape) == 2 or len(shape) == 3 and shape[2] in (3, 4)):
        raise ImageError(
            f"{name} is an array of dtype {array.dtype} and shape {list(shape)}, "
            "expected uint8 [h, w], [h, w, 3] or [h, w, 4]"
        )
    if 0 in shape:
        raise ImageError(f"{name} is an array of shape {list(shape)}, which has no pixels")
    return Image.fromarray(array)
