"""Image files that Pillow cannot write: PNG files with given bit depths and chunks."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

INVERSE = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
"""The EXIF orientation that undoes another one."""


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def exif_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def add_exif_at_the_end(png: bytes, orientation: int) -> bytes:
    """Add an eXIf chunk behind the pixels, where a reader of the header does not see it."""
    chunk = png_chunk(b"eXIf", exif_orientation(orientation).tobytes().removeprefix(b"Exif\0\0"))
    end = png.rindex(b"IEND") - 4
    return png[:end] + chunk + png[end:]


def png_file(values: np.ndarray, bits: int, transparent: tuple[int, ...] | None = None) -> bytes:
    """Encode integers of the given bits, [h, w] gray or [h, w, 2 to 4] with colors or alpha."""
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    rows = values.reshape(height, width * channels)
    if bits == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        bitmaps = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        packed = [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bitmaps]
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header)]
    if transparent is not None:
        chunks.append(png_chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    chunks.append(png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed))))
    return b"\x89PNG\r\n\x1a\n" + b"".join([*chunks, png_chunk(b"IEND", b"")])
