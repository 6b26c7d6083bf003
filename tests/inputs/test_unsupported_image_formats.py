"""Files that are no images, or that Pillow would misread, are named as what they are."""

import base64
import sys
from types import SimpleNamespace

import pytest
from image_files import encode
from PIL import Image, TiffImagePlugin

from ovis_jax.errors import ImageError
from ovis_jax.inputs.open_image import open_image, open_image_header

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 12345\n" % 0
HTML = b"\n<!DOCTYPE html>\n<html><body><svg></svg></body></html>"
SVG = b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg"/>'
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


def tiff(**tags: tuple[int, int | bytes]) -> bytes:
    """A TIFF file with further tags: name=(number, value)."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for number, value in tags.values():
        info[number] = value
    return encode(Image.new("RGB", (8, 6)), "TIFF", tiffinfo=info)


DNG = tiff(subfile_type=(254, 1), version=(50706, b"\x01\x04\x00\x00"))
NEF = tiff(subfile_type=(254, 1), sub_ifds=(330, 8))
CASES = {
    "pointer": (LFS, "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    "page": (HTML, "an HTML page; download the image itself"),
    "drawing": (SVG, "an SVG drawing, which has no pixels; save it as a PNG file"),
    "plain drawing": (b"\xef\xbb\xbf<svg></svg>", "an SVG drawing"),
    "heic": (HEIC, "a HEIC photo; run `pip install pillow-heif`, or save it as a JPEG"),
    "dng": (DNG, "the raw data of a camera; export the photo as a JPEG or PNG file"),
    "nef": (NEF, "the raw data of a camera"),
    "cr2": (b"II*\0\x10\0\0\0CR\x02\0" + bytes(40), "the raw data of a camera"),
    "cr3": (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "the raw data of a camera"),
    "raf": (b"FUJIFILMCCD-RAW 0201", "the raw data of a camera"),
    "pdf": (b"%PDF-1.7\n", "a PDF document; save its pages as PNG files"),
    "mp4": (b"\0\0\0\x18ftypisom\0\0\2\0", "a video or audio file; save a frame"),
    "empty": (b"", "an empty file"),
}


@pytest.fixture(autouse=True)
def no_plugin(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)


@pytest.mark.parametrize("kind", CASES)
def test_the_error_names_the_file_and_its_content(kind, tmp_path):
    data, message = CASES[kind]
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    for exact in (False, True):
        with pytest.raises(ImageError, match=rf"photo\.png is {message}"):
            open_image(path, exact=exact)
    with pytest.raises(ImageError, match=f"picture 3 is {message}"):
        open_image(data, "picture 3")
    untrusted = f"the bytes are {message.partition(';')[0]}.* .supported formats: PNG"
    with pytest.raises(ImageError, match=untrusted):
        open_image_header(data)
    with pytest.raises(ImageError, match=untrusted):
        open_image(f"data:;base64,{base64.b64encode(data).decode()}")


def test_a_heic_photo_is_read_with_the_plugin(monkeypatch):
    registered = []
    plugin = SimpleNamespace(register_heif_opener=lambda: registered.append("HEIF"))
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    with pytest.raises(ImageError, match="a HEIC photo"):
        open_image(HEIC)
    assert registered == ["HEIF"]
    open_image(encode(Image.new("RGB", (2, 2))))
    assert registered == ["HEIF"]


def test_ordinary_tiff_files_are_no_raw_data():
    """A reduced image alone, or further resolutions after the full one, are ordinary."""
    for data in (tiff(), tiff(subfile_type=(254, 1)), tiff(sub_ifds=(330, 8))):
        assert open_image(data).size == (8, 6)


def test_other_bytes_keep_their_message():
    for data in (b"text", b"<note>text</note>", b"GIF89"):
        with pytest.raises(ImageError, match="image 2 cannot be decoded .* not recognize"):
            open_image(data, "image 2")
        with pytest.raises(ImageError, match="not a complete image .supported formats: PNG"):
            open_image_header(data)
