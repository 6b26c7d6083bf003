"""Images from strangers: damaged, huge, or on servers inside the network."""

import asyncio
import base64
import io
import socket
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given
from PIL import Image
from serving_setup import make_image

from ovis_jax.inputs import open_image
from ovis_jax.inputs.open_image import (
    MAX_JPEG_SCANS,
    UNTRUSTED_FORMATS,
    decode_data_url,
    decode_image,
)
from ovis_jax.server import images
from ovis_jax.server.errors import ApiError
from ovis_jax.server.images import fetch_if_remote, image_errors, is_public_address, open_images

MAX_BYTES, MAX_PIXELS, MAX_IMAGE_PIXELS = 100_000, 250_000, 200_000


def encode_image(format: str, size: tuple[int, int] = (20, 16)) -> bytes:
    file = io.BytesIO()
    make_image(0, size).save(file, format)
    return file.getvalue()


def fetch(url: str, *, allow_remote: bool = True) -> str | bytes:
    return asyncio.run(
        fetch_if_remote(url, "image", allow_remote=allow_remote, max_bytes=MAX_BYTES)
    )


def decode(*files: bytes) -> list[Image.Image]:
    """Decode the images of one request: first all headers, then the pixels."""
    named = [(data, f"image {n}") for n, data in enumerate(files)]
    opened = open_images(named, MAX_PIXELS, MAX_IMAGE_PIXELS)
    for n, image in enumerate(opened):
        with image_errors(f"image {n}"):
            decode_image(image)
    return opened


def rejected(url: str, **options: bool) -> str:
    with pytest.raises(ApiError) as caught:
        fetch(url, **options)
    assert caught.value.status_code == 400 and caught.value.param == "image"
    return caught.value.detail


@pytest.mark.parametrize("format", UNTRUSTED_FORMATS)
def test_formats(format):
    data = encode_image(format)
    url = f"data:image/{format.lower()};base64,{base64.b64encode(data).decode()}"
    assert fetch(url) == url and decode_data_url(url) == data
    assert [image.size for image in decode(data)] == [(20, 16)]


@given(
    st.sampled_from(UNTRUSTED_FORMATS),
    st.integers(0, 2**32),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=3),
    st.floats(0, 1),
)
@example("PNG", 0, [], 0.5)
def test_damaged_files_are_rejected_or_decoded(format, seed, changes, kept):
    data = bytearray(encode_image(format))
    for place, new in changes:
        start = int(place * len(data))
        data[start : start + len(new)] = new
    check(bytes(data[: max(1, int(kept * len(data)))]))


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM"])
)
def test_other_bytes_are_rejected(data, head):
    check(head + data)


def check(data: bytes) -> None:
    try:
        (image,) = decode(data)
    except ApiError as error:
        assert error.status_code == 400 and error.param == "image 0"
    else:
        assert np.asarray(image).size and image.width * image.height <= MAX_PIXELS


def test_a_decompression_bomb_is_never_decoded(monkeypatch):
    bomb, small = encode_image("PNG", (600, 600)), encode_image("PNG", (300, 300))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ApiError, match=r"600 x 600, more than 200000 .*--max-image-pix") as caught:
        decode(bomb)
    assert caught.value.code == "image_too_large"
    # A header with more pixels than Pillow itself accepts.
    header = bytearray(bomb)
    header[16:24] = (60_000).to_bytes(4) * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4)
    with pytest.raises(ApiError, match="far more pixels") as caught:
        decode(bytes(header))
    assert caught.value.code == "image_too_large"
    # Images that are small alone and too large together.
    with pytest.raises(ApiError, match="300 x 300, with the images before it, more") as caught:
        decode(*[small] * 3)
    assert caught.value.param == "image 2" and caught.value.code == "image_too_large"


def test_images_made_to_be_slow_are_never_decoded(monkeypatch):
    """Each scan of a JPEG file costs as much as the first, and Pillow copies each EXIF tag."""
    file = io.BytesIO()
    make_image(0, (20, 16)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    missing = MAX_JPEG_SCANS - data.count(b"\xff\xda")
    assert decode(data[:-2] + missing * last_scan + data[-2:])
    exif = b"\xff\xe1\xff\xffExif\0\0" + bytes(2**16 - 9)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ApiError, match=f"has {MAX_JPEG_SCANS + 1} scans, expected at most"):
        decode(data[:-2] + (missing + 1) * last_scan + data[-2:])
    with pytest.raises(ApiError, match="bytes of EXIF data, expected at most 131072"):
        decode(data[:2] + 3 * exif + data[2:])


@pytest.mark.parametrize(
    "format, place, part",
    [
        ("JPEG", 2, b"\xff\xe5\0\2"),
        ("PNG", 33, bytes(4) + b"abCd" + zlib.crc32(b"abCd").to_bytes(4)),
        ("GIF", 13 + 3 * 256, b"!\xfe\1a\0"),
    ],
)
def test_a_file_of_many_parts_is_not_parsed_to_its_end(monkeypatch, format, place, part):
    """Pillow reads each part in Python."""
    data = encode_image(format)
    monkeypatch.setattr(open_image, "MAX_READS", 100)
    assert decode(data[:place] + 5 * part + data[place:])
    with pytest.raises(ApiError, match="the image file has too many parts"):
        decode(data[:place] + 100 * part + data[place:])


@pytest.mark.parametrize("at_the_end", [False, True])
def test_too_much_exif_data_is_never_parsed(monkeypatch, at_the_end):
    png = encode_image("PNG")
    body = b"eXIf" + b"II*\0" + bytes(2**17)
    chunk = (len(body) - 4).to_bytes(4) + body + zlib.crc32(body).to_bytes(4)
    place = len(png) - 12 if at_the_end else 33
    monkeypatch.setattr(Image.Image, "getexif", lambda self: pytest.fail("parsed"))
    with pytest.raises(ApiError, match="bytes of EXIF data, expected at most 131072"):
        decode(png[:place] + chunk + png[place:])


def test_formats_that_start_other_programs_are_rejected():
    with pytest.raises(ApiError, match="PNG, JPEG"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


@pytest.mark.parametrize(
    "address, public",
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.215.14", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a01:203", False),
        ("64:ff9b::5db8:d70e", True),
        ("64:ff9b:1::5db8:d70e", False),
        ("2002:7f00:1::", False),
        ("2002:5db8:d70e::", False),
        ("2001:0:5db8:d70e::", False),
        ("fec0::1", False),
        ("::7f00:1", False),
        ("::5db8:d70e", False),
        ("::ffff:0:7f00:1", False),
    ],
)
def test_public_addresses(address, public):
    assert is_public_address(address) is public


class ImageHandler(BaseHTTPRequestHandler):
    """Serves an image, a redirect, and a long body."""

    paths: ClassVar[list[str]] = []

    def do_GET(self):
        self.paths.append(self.path)
        self.send_response({"/moved": 302, "/none": 404}.get(self.path, 200))
        self.send_header("Location", "/a.png")
        self.end_headers()
        for _ in range(50 if self.path == "/long" else 1):
            try:
                self.wfile.write(encode_image("PNG") * 9)
            except OSError:
                return

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def image_server():
    server = HTTPServer(("127.0.0.1", 0), ImageHandler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "0x7f.1", "2130706433"])
def test_servers_inside_the_network_get_no_request(image_server, host):
    ImageHandler.paths.clear()
    port = image_server.rpartition(":")[2]
    rejected(f"http://{host}:{port}/a.png")
    assert ImageHandler.paths == []


def test_a_host_with_one_private_address_gets_no_request(image_server, monkeypatch):
    hosts = []

    async def getaddrinfo(self, host, port, **_):
        hosts.append(host)
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, ("93.184.215.14", port)), (*kind, ("10.0.0.1", port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    assert "public" in rejected("http://pictures.example/a.png")
    assert hosts == ["pictures.example"]


def test_public_images_are_fetched_without_redirects(image_server, monkeypatch):
    monkeypatch.setattr(images, "is_public_address", lambda address: True)
    ImageHandler.paths.clear()
    assert fetch(f"{image_server}/a.png").startswith(b"\x89PNG")
    assert ImageHandler.paths == ["/a.png"]
    assert "302" in rejected(f"{image_server}/moved") and "404" in rejected(f"{image_server}/none")
    assert "longer than 100000 bytes" in rejected(f"{image_server}/long")
    assert "cannot be fetched" in rejected("http://localhost:1/a.png")
    assert "without a user" in rejected(image_server.replace("//", "//me:word@"))
    assert "does not fetch images" in rejected(image_server, allow_remote=False)


@pytest.mark.parametrize("url", ["http://", "http://[", "http://a b/", "https://\ud800/", "http:"])
def test_malformed_urls(url):
    rejected(url)
