"""What every request passes before its body is read: the host, the key, the size, the time."""

import asyncio
import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ovis_jax.serving.refusals import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::\d*)?")
"""What a Host header holds: a name or an address, those of IPv6 in brackets, and maybe a port."""


class KnownHosts:
    """An ASGI middleware: a server on loopback answers no request that names another host.

    A web site can let its own name lead to 127.0.0.1 (DNS rebinding). A visitor's browser then
    takes this server for that site's own, and the site reads its answers. Only the Host header
    tells. On an address that others reach nothing is checked: its names are not known here.

    Starlette's TrustedHostMiddleware compares names alone, without a rule for 127.0.0.0/8, and its
    refusal neither names the host nor says how to allow it.

    Args:
      app: what stands behind it.
      host: the address that the server listens on, or its name.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], host: str):
        self._app, self._own = app, host.lower()
        self._checks = _loopback(host) or _leads_to_loopback(host)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        foreign = None
        if self._checks and scope["type"] in ("http", "websocket"):
            foreign = self._foreign(scope)
        if foreign is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # 403, as nothing was accepted
        else:
            message = (
                f"this server listens on loopback and does not answer for the host {foreign!r}; "
                "ask for localhost, or start it with --host to let others in"
            )
            refusal = ApiError(403, message, code="foreign_host")
            await refusal.response()(scope, receive, send)

    def _foreign(self, scope: Message) -> str | None:
        """The host that a request names, where it is another; "" where it names none."""
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        for host in given or [""]:
            found = HOST.fullmatch(host)
            name = found[1].lower() if found else ""
            if not name or not (_loopback(name) or name == self._own):
                return host
        return None


def _loopback(host: str) -> bool:
    """Whether a host is localhost, or an address of that kind."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _leads_to_loopback(name: str) -> bool:
    try:
        found = socket.getaddrinfo(name, None)
    except OSError:
        return False  # nothing can listen there
    return all(_loopback(str(address[0])) for *_, address in found)


class Gate:
    """An ASGI middleware for the paths below /v1.

    Args:
      app: what stands behind it.
      api_key: what a request has to show; None for an open server.
      max_body: bytes of a body.
      seconds: that a body may take to arrive.
      count: called with the status of each answer.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        api_key: str | None,
        max_body: int,
        seconds: float,
        count: Callable[[int], None],
    ):
        self._app, self._max_body, self._seconds, self._count = app, max_body, seconds, count
        self._key = None if api_key is None else _digest(api_key.encode())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return

        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._count(message["status"])
            await send(message)

        headers = dict(scope["headers"])
        refusal = self._refusal(headers)
        if refusal is not None:
            await refusal.response()(scope, receive, counted)
        else:
            try:
                await self._app(scope, self._limited(receive), counted)
            except Exception:  # what answers it stands before this middleware
                if not started:
                    self._count(500)
                raise

    def _refusal(self, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._key is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            # Digests are compared, in constant time: neither length nor content can be measured.
            known = hmac.compare_digest(_digest(given.strip()), self._key)
            if scheme.lower() != b"bearer" or not known:
                message = "the API key is missing or wrong; send Authorization: Bearer KEY"
                return ApiError(401, message, code="invalid_api_key")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and (len(length) > 15 or int(length) > self._max_body):
            return self._too_large()
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Raise when the body is longer, or slower, than it may be."""
        size, whole = 0, False
        end = asyncio.get_running_loop().time() + self._seconds

        async def limited() -> Message:
            nonlocal size, whole
            if whole:
                return await receive()  # only whether the client is still there
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                message = f"the body did not come within {self._seconds:g} seconds"
                raise ApiError(408, message, code="request_timeout") from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self._max_body:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        message = f"the body is longer than {self._max_body} bytes"
        return ApiError(413, message, code="request_too_large")


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
