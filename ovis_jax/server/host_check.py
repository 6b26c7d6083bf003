"""An ASGI middleware against DNS rebinding, for the server and the page."""

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable

from ovis_jax.server.errors import ApiError
from ovis_jax.server.middleware import Message, Receive, Send

HOST_HEADER = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::\d*)?")
"""A Host header: a name or an address (IPv6 in brackets), and optionally a port."""


class HostCheckMiddleware:
    """ASGI middleware that rejects foreign Host headers while the server listens on loopback.

    A web site can point its own name to 127.0.0.1 (DNS rebinding). A visitor's browser then treats
    this server as part of that site, and the site can read its answers. Only the Host header
    reveals this. On addresses that other machines can reach, nothing is checked, because the names
    of the server are unknown.

    Starlette's TrustedHostMiddleware compares names only: it has no rule for 127.0.0.0/8, and its
    error neither names the host nor says how to allow it.

    Args:
      app: The application.
      host: Address or host name that the server listens on.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], host: str):
        self._app, self._own_host = app, host.lower()
        self._enabled = _is_loopback(host) or _resolves_to_loopback(host)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or send an error response."""
        foreign = None
        if self._enabled and scope["type"] in ("http", "websocket"):
            foreign = self._foreign_host(scope)
        if foreign is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # the client receives a 403
        else:
            message = (
                f"this server listens on loopback and does not answer for the host {foreign!r}; "
                "connect to localhost, or start the server with --host to allow other hosts"
            )
            await ApiError(403, message, code="foreign_host").response()(scope, receive, send)

    def _foreign_host(self, scope: Message) -> str | None:
        """Return the first Host header that names another host; "" if there is no Host header."""
        headers = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        for header in headers or [""]:
            match = HOST_HEADER.fullmatch(header)
            name = match[1].lower() if match else ""
            if not name or not (_is_loopback(name) or name == self._own_host):
                return header
        return None


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _resolves_to_loopback(name: str) -> bool:
    try:
        found = socket.getaddrinfo(name, None)
    except OSError:
        return False  # the server cannot listen there
    return all(_is_loopback(str(address[0])) for *_, address in found)
