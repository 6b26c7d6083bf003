"""Images of a request: data URLs and, where they are allowed, images of other servers.

A server that fetches what users name can be made to ask inside its own network. So a name is looked
up here, every address it has must be public, the connection goes to the address that was looked at,
and no redirect is followed.
"""

import asyncio
import base64
import binascii
import ipaddress
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast
from urllib.parse import unquote_to_bytes, urlsplit

import httpcore
from PIL import Image

from ovis_jax.errors import ImageError
from ovis_jax.serving import decoding
from ovis_jax.serving.refusals import ApiError

NAT64 = ipaddress.ip_network("64:ff9b::/96")
GIVEN_OUT = ipaddress.ip_network("2000::/3")
"""What all addresses of version 6 on the internet begin with, but those that hold one of 4."""

SECONDS = 10.0
"""For one image of another server, all in all."""


class ImageLimits(NamedTuple):
    """What the images of a request may be."""

    max_bytes: int
    """Of those that are fetched, together."""
    max_pixels: int
    """Of all of them together."""
    remote: bool
    """Whether images of other servers are fetched."""


async def fetch_image(url: str, name: str, limits: ImageLimits) -> str | bytes:
    """What holds an image file that a request names: its data URL, or the bytes that were fetched.

    Raises:
      ApiError: 400 that says why it cannot be had; `name` is the field.
    """
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        return url
    if scheme not in ("http", "https"):
        raise _bad(name, "expected a data: URL, such as data:image/png;base64,...")
    if not limits.remote:
        raise _bad(name, "this server fetches no images; send it as a data: URL", "remote_image")
    try:
        async with asyncio.timeout(SECONDS):
            return await _fetch(url, limits.max_bytes)
    except TimeoutError:
        raise _bad(name, f"it did not come within {SECONDS:g} seconds") from None
    except ImageError as error:
        raise _bad(name, str(error), "remote_image") from None
    # Of a broken server, name or certificate nothing is told but that it failed; each layer below
    # has exceptions of its own.
    except Exception:
        raise _bad(name, "it cannot be fetched") from None


def read_data_url(url: str, name: str) -> bytes:
    """The bytes that a data URL holds.

    Raises:
      ApiError: 400 where it is not one, or not of base64.
    """
    head, comma, body = url[5:].partition(",")
    if not comma:
        raise _bad(name, "a data: URL has a comma before its data")
    try:
        if head.lower().endswith(";base64"):
            # Of millions of escapes it takes seconds, and base64 needs none.
            data = unquote_to_bytes(body) if "%" in body else body
            return base64.b64decode(data, validate=True)
        return unquote_to_bytes(body)
    except (binascii.Error, ValueError):
        raise _bad(name, "the data: URL does not hold base64") from None


def open_images(files: Sequence[tuple[str | bytes, str]], limits: ImageLimits) -> list[Image.Image]:
    """Open files of images, and add up what they would take; none is decoded yet.

    Args:
      files: what `fetch_image` gives, each with its field.
      limits: what they may be.

    Raises:
      ApiError: 400 where one is no image, or all together have too many pixels.
    """
    images: list[Image.Image] = []
    pixels = 0
    for file, name in files:
        data = read_data_url(file, name) if isinstance(file, str) else file
        with _refused(name):
            images.append(decoding.open_header(data))
            pixels = decoding.add_pixels(pixels, images[-1], limits.max_pixels)
    return images


def decode(image: Image.Image, name: str) -> None:
    """Decode an image that was opened.

    Raises:
      ApiError: 400 where it is broken.
    """
    with _refused(name):
        decoding.decode(image)


@contextmanager
def _refused(name: str) -> Iterator[None]:
    try:
        yield
    except decoding.TooManyPixels as error:
        raise _bad(name, str(error), "image_too_large") from None
    except ImageError as error:
        raise _bad(name, str(error)) from None


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet: not private, local, reserved or shared."""
    ip: Any = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        # Addresses of version 4 within those of version 6.
        if ip.ipv4_mapped is not None or ip in NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        # 6to4 and Teredo, which hold one too, are out of use.
        if ip not in GIVEN_OUT or ip.sixtofour or ip.teredo:
            return False
    return ip.is_global and not ip.is_multicast


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to public addresses alone, to the very address that was looked at."""

    def __init__(self) -> None:
        self._inner = cast(httpcore.AsyncNetworkBackend, httpcore.AnyIOBackend())

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Look the host up, and connect to its first address if all of them are public."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        if not addresses or not all(map(is_public, addresses)):
            raise ImageError("its server is not on the public internet")
        return await self._inner.connect_tcp(addresses[0], port, timeout, local_address)


async def _fetch(url: str, max_bytes: int) -> bytes:
    parts = urlsplit(url)
    if not parts.hostname or parts.username or parts.password:
        raise ImageError("expected http(s)://host/path without a user")
    data = bytearray()
    async with (
        httpcore.AsyncConnectionPool(network_backend=CheckedBackend()) as pool,
        pool.stream("GET", url.partition("#")[0]) as response,
    ):
        if response.status != 200:
            raise ImageError(f"its server answers {response.status}; redirects are not followed")
        async for part in response.aiter_stream():
            data += part
            if len(data) > max_bytes:
                raise ImageError(f"it is longer than {max_bytes} bytes, which is what may come")
    return bytes(data)


def _bad(name: str, message: str, code: str = "invalid_image") -> ApiError:
    return ApiError(400, f"{name}: {message}", param=name, code=code)
