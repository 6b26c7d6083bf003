"""Images in a request: data URLs and, if allowed, images on other servers.

A server that fetches URLs for its clients can be abused to access its own network. Therefore, every
address of a host name must be public, the connection is made to the address that was checked, and
redirects are not followed.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpcore
from PIL import Image

from ovis_jax.errors import ImageError
from ovis_jax.inputs.open_image import (
    TooManyPixelsError,
    add_image_pixels,
    decode_data_url,
    is_data_url,
    open_image_header,
)
from ovis_jax.server.errors import ApiError, bad_request

NAT64 = ipaddress.ip_network("64:ff9b::/96")
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
"""The prefix of all public IPv6 addresses, except for addresses that embed an IPv4 address."""

FETCH_TIMEOUT = 10.0
"""Maximum time for fetching one image, in seconds."""


async def fetch_if_remote(
    url: str, param: str, *, allow_remote: bool, max_bytes: int
) -> str | bytes:
    """Fetch the image file that a URL refers to; a data URL is returned unchanged.

    Args:
      url: A data URL or an http(s) URL.
      param: Path of the field that contains the URL.
      allow_remote: Whether http(s) URLs are accepted.
      max_bytes: Maximum size of a fetched file.

    Raises:
      ApiError: The URL is not accepted, or the image cannot be fetched (status 400).
    """
    if is_data_url(url):
        return url
    scheme = url[:8].partition(":")[0].lower()
    if scheme not in ("http", "https"):
        raise _invalid(param, "expected a data: URL, such as data:image/png;base64,...")
    if not allow_remote:
        message = "this server does not fetch images; send the image as a data: URL"
        raise bad_request(param, message, "remote_image")
    try:
        async with asyncio.timeout(FETCH_TIMEOUT):
            return await _fetch(url, max_bytes)
    except TimeoutError:
        raise _invalid(param, f"the image did not arrive within {FETCH_TIMEOUT:g} s") from None
    except ImageError as error:
        raise bad_request(param, str(error), "remote_image") from None
    # Each layer below has its own exceptions. Clients must not see their messages, which would
    # describe the server's network.
    except Exception:
        raise _invalid(param, "the image cannot be fetched") from None


def open_images(
    files: Sequence[tuple[str | bytes, str]], max_pixels: int, max_image_pixels: int
) -> list[Image.Image]:
    """Open image files and check their sizes, without decoding them.

    Args:
      files: Results of `fetch_if_remote`, each with the path of its field.
      max_pixels: Maximum total number of pixels in all images.
      max_image_pixels: Maximum number of pixels in each image.

    Raises:
      ApiError: A file is not an image, or the images have too many pixels (status 400).
    """
    images: list[Image.Image] = []
    num_pixels = 0
    for file, param in files:
        with image_errors(param):
            data = decode_data_url(file) if isinstance(file, str) else file
            images.append(open_image_header(data))
            num_pixels = add_image_pixels(num_pixels, images[-1], max_pixels, max_image_pixels)
    return images


@contextmanager
def image_errors(param: str) -> Iterator[None]:
    """Convert an `ImageError` from the block to an `ApiError` that names a field."""
    try:
        yield
    except TooManyPixelsError as error:
        message = f"{error} (see --max-pixels and --max-image-pixels)"
        raise bad_request(param, message, "image_too_large") from None
    except ImageError as error:
        raise _invalid(param, str(error)) from None


def is_public_address(address: str) -> bool:
    """Return whether an IP address is public: not private, local, reserved or shared."""
    ip: Any = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        # IPv6 addresses that embed an IPv4 address.
        if ip.ipv4_mapped is not None or ip in NAT64:
            return is_public_address(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        # 6to4 and Teredo addresses also embed one, but they are obsolete.
        if ip not in GLOBAL_UNICAST or ip.sixtofour or ip.teredo:
            return False
    return ip.is_global and not ip.is_multicast


class PublicAddressBackend(httpcore.AsyncNetworkBackend):
    """Network backend that only connects to public addresses."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolve a host name, and connect to the first address if all addresses are public."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        if not addresses or not all(map(is_public_address, addresses)):
            raise ImageError("the image's server is not on the public internet")
        backend: Any = httpcore.AnyIOBackend()
        return await backend.connect_tcp(addresses[0], port, timeout, local_address)


async def _fetch(url: str, max_bytes: int) -> bytes:
    parts = urlsplit(url)
    if not parts.hostname or parts.username or parts.password:
        raise ImageError("expected http(s)://host/path without a user")
    data = bytearray()
    async with (
        httpcore.AsyncConnectionPool(network_backend=PublicAddressBackend()) as pool,
        pool.stream("GET", url.partition("#")[0]) as response,
    ):
        if response.status != 200:
            raise ImageError(
                f"the image's server responded with {response.status}; redirects are not followed"
            )
        async for part in response.aiter_stream():
            data += part
            if len(data) > max_bytes:
                raise ImageError(f"the image is longer than {max_bytes} bytes, the maximum")
    return bytes(data)


def _invalid(param: str, message: str) -> ApiError:
    return bad_request(param, message, "invalid_image")
