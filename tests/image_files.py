"""Image files that Pillow cannot write: PNG and TIFF files with given bit depths and chunks."""

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
    """Add an eXIf chunk after the pixels, where a reader of the header does not see it."""
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


def gray_tiff_file(values: np.ndarray, bits: int, *, white_is_zero: bool = False) -> bytes:
    """Encode integers of 12 or 16 bits, [h, w] with an even width, in an uncompressed TIFF file."""
    height, width = values.shape
    pixels = values.astype("<u2").tobytes()
    if bits == 12:
        left, right = values[:, ::2], values[:, 1::2]
        packed = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], axis=-1)
        pixels = packed.astype(np.uint8).tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 0}
    tags |= {277: 1, 278: height, 279: len(pixels)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4  # the offset of the pixels
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    header = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return header + b"".join(entries) + bytes(4) + pixels
