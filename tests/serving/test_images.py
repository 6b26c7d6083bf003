"""Images of strangers: broken, huge, or on servers that nobody outside should reach."""

import asyncio
import base64
import io
import socket
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given
from PIL import Image
from served import picture

from ovis_jax.serving import images
from ovis_jax.serving.decoding import FORMATS
from ovis_jax.serving.images import (
    ImageLimits,
    decode,
    fetch_image,
    is_public,
    open_images,
    read_data_url,
)
from ovis_jax.serving.refusals import ApiError

LIMITS = ImageLimits(max_bytes=100_000, max_pixels=250_000, remote=True)


def encoded(format: str, size: tuple[int, int] = (20, 16)) -> bytes:
    file = io.BytesIO()
    picture(0, size).save(file, format)
    return file.getvalue()


def read(url: str, limits: ImageLimits = LIMITS) -> bytes:
    file = asyncio.run(fetch_image(url, "image", limits))
    return read_data_url(file, "image") if isinstance(file, str) else file


def decoded(*files: bytes) -> list[Image.Image]:
    """Images as a request's are read: all headers first."""
    opened = open_images([(data, f"image {n}") for n, data in enumerate(files)], LIMITS)
    for n, image in enumerate(opened):
        decode(image, f"image {n}")
    return opened


def refused(url: str, limits: ImageLimits = LIMITS) -> str:
    with pytest.raises(ApiError) as caught:
        read(url, limits)
    assert caught.value.status_code == 400 and caught.value.param == "image"
    return caught.value.detail


@pytest.mark.parametrize("format", FORMATS)
def test_formats(format):
    data = encoded(format)
    url = f"data:image/{format.lower()};base64,{base64.b64encode(data).decode()}"
    assert read(url) == data
    assert [image.size for image in decoded(data)] == [(20, 16)]


def test_data_urls_of_other_forms():
    assert read("DATA:;BASE64,aGk=") == b"hi"
    assert read("data:,a%20b") == b"a b"
    assert read("data:;base64,aGk%3D") == b"hi"


def test_only_escapes_are_unquoted(monkeypatch):
    """It takes seconds of a large text that is nothing but escapes."""
    monkeypatch.setattr(images, "unquote_to_bytes", lambda text: pytest.fail("unquoted"))
    assert read("data:;base64,aGk=") == b"hi"


@given(
    st.sampled_from(FORMATS),
    st.integers(0, 2**32),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=3),
    st.floats(0, 1),
)
@example("PNG", 0, [], 0.5)
def test_damaged_files_are_refused_or_read(format, seed, changes, kept):
    data = bytearray(encoded(format))
    for place, new in changes:
        start = int(place * len(data))
        data[start : start + len(new)] = new
    check(bytes(data[: max(1, int(kept * len(data)))]))


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM"])
)
def test_other_bytes_are_refused(data, head):
    check(head + data)


def check(data: bytes) -> None:
    try:
        (image,) = decoded(data)
    except ApiError as error:
        assert error.status_code == 400 and error.param == "image 0"
    else:
        assert np.asarray(image).size and image.width * image.height <= LIMITS.max_pixels


def test_a_decompression_bomb_is_never_decoded(monkeypatch):
    bomb, small = encoded("PNG", (600, 600)), encoded("PNG", (300, 300))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ApiError, match="600 x 600, more than 250000") as caught:
        decoded(bomb)
    assert caught.value.code == "image_too_large"
    # A header that says far more than Pillow itself would take.
    header = bytearray(bomb)
    header[16:24] = (60_000).to_bytes(4) * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4)
    with pytest.raises(ApiError, match="far more pixels") as caught:
        decoded(bytes(header))
    assert caught.value.code == "image_too_large"
    # Small ones that are too many, the first of them before the others are known.
    with pytest.raises(ApiError, match="300 x 300, with the images before it, more") as caught:
        decoded(*[small] * 3)
    assert caught.value.param == "image 2" and caught.value.code == "image_too_large"


def test_formats_that_start_other_programs_are_not_read():
    with pytest.raises(ApiError, match="PNG, JPEG"):
        decoded(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


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
    assert is_public(address) is public


class Pictures(BaseHTTPRequestHandler):
    """A picture, a redirect, and a body without an end."""

    def do_GET(self):
        self.send_response({"/moved": 302, "/none": 404}.get(self.path, 200))
        self.send_header("Location", "/a.png")
        self.end_headers()
        for _ in range(50 if self.path == "/long" else 1):
            try:
                self.wfile.write(encoded("PNG") * 9)
            except OSError:
                return

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def pictures():
    server = HTTPServer(("127.0.0.1", 0), Pictures)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "0x7f.1", "2130706433"])
def test_servers_of_ones_own_network_are_not_asked(pictures, host):
    port = pictures.rpartition(":")[2]
    message = refused(f"http://{host}:{port}/a.png")
    assert "public" in message or "cannot be fetched" in message


def test_a_name_with_one_private_address_is_not_asked(pictures, monkeypatch):
    asked = []

    async def lookup(self, host, port, **_):
        asked.append(host)
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, ("93.184.215.14", port)), (*kind, ("10.0.0.1", port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", lookup)
    assert "public" in refused("http://pictures.example/a.png")
    assert asked == ["pictures.example"]


def test_what_is_allowed_is_fetched_once_and_no_further(pictures, monkeypatch):
    monkeypatch.setattr(images, "is_public", lambda address: True)
    assert read(f"{pictures}/a.png").startswith(b"\x89PNG")
    assert "302" in refused(f"{pictures}/moved") and "404" in refused(f"{pictures}/none")
    assert "longer than 100000 bytes" in refused(f"{pictures}/long")
    assert "cannot be fetched" in refused("http://localhost:1/a.png")
    assert "without a user" in refused(pictures.replace("//", "//me:word@"))
    assert "fetches no images" in refused(pictures, LIMITS._replace(remote=False))


@pytest.mark.parametrize("url", ["http://", "http://[", "http://a b/", "https://\ud800/", "http:"])
def test_urls_that_are_none(url):
    assert refused(url)
