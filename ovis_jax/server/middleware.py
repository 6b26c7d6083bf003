"""Checks on every request before its body is parsed: the API key, the size and the time."""

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ovis_jax.server.errors import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class AuthAndLimitsMiddleware:
    """ASGI middleware that checks requests to /v1 and counts the responses.

    Args:
      app: The application.
      api_key: API key that clients must send; None for an open server.
      max_body_bytes: Maximum number of bytes per body.
      body_timeout: Maximum time for a body to arrive, in seconds.
      on_response: Called with the status of each response.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        api_key: str | None,
        max_body_bytes: int,
        body_timeout: float,
        on_response: Callable[[int], None],
    ):
        self._app, self._on_response = app, on_response
        self._max_body_bytes, self._body_timeout = max_body_bytes, body_timeout
        self._key_digest = None if api_key is None else _digest(api_key.encode())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or send an error response."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return

        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._on_response(message["status"])
            await send(message)

        error = self._check_headers(dict(scope["headers"]))
        if error is not None:
            await error.response()(scope, receive, counted)
            return
        try:
            await self._app(scope, self._limited(receive), counted)
        except Exception:  # the 500 response is sent outside of this middleware
            if not started:
                self._on_response(500)
            raise

    def _check_headers(self, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._key_digest is not None:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            # Digests are compared in constant time, so timing reveals nothing about the key.
            matches = hmac.compare_digest(_digest(key.strip()), self._key_digest)
            if scheme.lower() != b"bearer" or not matches:
                message = "the API key is missing or wrong; send Authorization: Bearer KEY"
                return ApiError(401, message, code="invalid_api_key")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and (len(length) > 15 or int(length) > self._max_body_bytes):
            return self._too_large()
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Return a `receive` that raises if the body is too large or too slow."""
        size, complete = 0, False
        end = asyncio.get_running_loop().time() + self._body_timeout

        async def limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()  # the only message left is a disconnect
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                text = f"the body did not arrive within {self._body_timeout:g} seconds"
                raise ApiError(408, text, code="request_timeout") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self._max_body_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        message = f"the body is longer than {self._max_body_bytes} bytes"
        return ApiError(413, message, code="request_too_large")


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
