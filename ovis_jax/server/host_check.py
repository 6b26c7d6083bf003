"""An ASGI middleware that prevents DNS rebinding, for the server and the web UI."""

import ipaddress
import re
import socket

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ovis_jax.server.errors import ApiError

HOST_HEADER = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::\d*)?")
"""Pattern for a Host header: a name or an address (IPv6 in brackets), and optionally a port."""


class HostCheckMiddleware:
    """ASGI middleware that rejects Host headers of other hosts if the server listens on loopback.

    A website can make its own host name resolve to 127.0.0.1 (DNS rebinding). A visitor's browser
    then treats this server as part of the website, so the website can read the server's responses.
    Only the Host header reveals this. If the server listens on an address that other machines can
    reach, nothing is checked, because the names of the server are unknown.

    Starlette's TrustedHostMiddleware is not enough: it only compares names, so it has no rule for
    127.0.0.0/8. In addition, its error message neither names the host nor says how to allow this
    host.

    Args:
      app: The application.
      host: Address or host name that the server listens on.
    """

    def __init__(self, app: ASGIApp, host: str):
        self._app, self._own_host = app, host.lower()
        self._enabled = _is_loopback(host) or _resolves_to_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application, or send an error response."""
        foreign = None
        if self._enabled and scope["type"] in ("http", "websocket"):
            foreign = self._foreign_host(scope)
        app = self._app
        if foreign is not None:
            message = (
                f"this server listens on loopback and does not answer for the host {foreign!r}; "
                "connect to localhost, or start the server with --host to allow other hosts"
            )
            app = ApiError(403, message, code="foreign_host").response()
        await app(scope, receive, send)

    def _foreign_host(self, scope: Scope) -> str | None:
        """Return a foreign Host header, "" if the header is missing, or None if it is valid."""
        for header in Headers(scope=scope).getlist("host") or [""]:
            match = HOST_HEADER.fullmatch(header)
            if not match or not (_is_loopback(match[1]) or match[1].lower() == self._own_host):
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
