"""Identifying files that are passed as images but that Pillow cannot read, with advice."""

import importlib
import io
from contextlib import suppress

from PIL import ExifTags, TiffImagePlugin

from ovis_jax.user_files import GIT_LFS_POINTER, GIT_LFS_START

HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
CAMERA_RAW_STARTS = (b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FUJIFILMCCD-RAW", b"FOVb")
CAMERA_RAW_PHOTOMETRIC = (32803, 34892)
"""Values of PhotometricInterpretation for a color filter array and for linear raw data."""


def is_camera_raw(data: bytes) -> bool:
    """Return whether a file contains the raw data of a camera, such as a DNG file.

    Pillow opens many of these files as TIFF, and then reads the small preview at their beginning.
    """
    if data.startswith(CAMERA_RAW_STARTS) or data[4:12] == b"ftypcrx ":
        return True
    if not data.startswith((b"II*\0", b"MM\0*")):
        return False
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        photometric = tags.get(ExifTags.Base.PhotometricInterpretation)
    except Exception:  # a damaged TIFF file
        return False
    starts_with_preview = tags.get(ExifTags.Base.NewSubfileType) == 1
    return (
        ExifTags.Base.DNGVersion in tags
        or photometric in CAMERA_RAW_PHOTOMETRIC
        or (starts_with_preview and ExifTags.Base.SubIFDs in tags)
        or data[8:10] == b"CR"
    )


def register_heic_plugin(data: bytes) -> None:
    """Register the plug-in pillow-heif if it is installed and the file is a HEIC image."""
    if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS:
        with suppress(ImportError):
            importlib.import_module("pillow_heif").register_heif_opener()


def describe_unsupported_format(data: bytes) -> str | None:
    """Return what an unreadable file is and, after a semicolon, what to do; None if unknown."""
    if not data:
        return "an empty file; copy or download it again"
    if data.startswith(GIT_LFS_START):
        return GIT_LFS_POINTER
    if is_camera_raw(data):
        return "the raw data of a camera; export the photo as a JPEG or PNG file"
    if data.startswith(b"%PDF"):
        return "a PDF document; save its pages as PNG files"
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        if brand in HEIC_BRANDS:
            return "a HEIC photo; run `pip install pillow-heif`, or save it as a JPEG file"
        if brand in (b"avif", b"avis"):
            return "an AVIF image; update Pillow, or save the image as a PNG file"
        return "a video or audio file; save a frame as a PNG file"
    head = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if head.startswith(b"<"):
        if b"<html" in head or b"<!doctype html" in head:
            return "an HTML page; download the image itself, not the page that shows it"
        if b"<svg" in head:
            return "an SVG drawing, which has no pixels; save it as a PNG file"
    return None
