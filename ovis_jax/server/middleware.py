"""Checks before a request body is parsed: the API key, the body's size and its arrival time."""

import asyncio
import hashlib
import hmac
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ovis_jax.server.errors import ApiError

PROTECTED = ("/v1/", "/tokenize")
"""Prefixes of the paths that need the API key and whose bodies are limited."""


class AuthAndLimitsMiddleware:
    """ASGI middleware that checks requests to /v1 and /tokenize, and counts the responses.

    FastAPI's `max_body_size` is not used, because it would reject a large body before the API key
    is checked, and it would respond in plain text instead of the API's error format.

    Args:
      app: The application.
      api_key: API key that clients must send; None for a server without a key.
      max_body_bytes: Maximum size of a body in bytes.
      body_timeout: Maximum time until a body has arrived, in seconds.
      on_response: Called with the HTTP status of each response.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        max_body_bytes: int,
        body_timeout: float,
        on_response: Callable[[int], None],
    ):
        self._app, self._on_response = app, on_response
        self._max_body_bytes, self._body_timeout = max_body_bytes, body_timeout
        self._key_digest = None if api_key is None else _digest(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application, or send an error response."""
        if scope["type"] != "http" or not scope["path"].startswith(PROTECTED):
            await self._app(scope, receive, send)
            return

        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._on_response(message["status"])
            await send(message)

        try:
            self._check_api_key(dict(scope["headers"]))
            messages: list[Message] = [
                {"type": "http.request", "body": await self._read_body(receive)}
            ]
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return

        async def receive_body() -> Message:
            return messages.pop() if messages else await receive()

        try:
            await self._app(scope, receive_body, counted)
        except Exception:  # the 500 response is sent outside this middleware
            if not started:
                self._on_response(500)
            raise

    def _check_api_key(self, headers: dict[bytes, bytes]) -> None:
        if self._key_digest is None:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # Comparing digests takes constant time, so the timing reveals nothing about the key.
        matches = hmac.compare_digest(_digest(key.strip()), self._key_digest)
        if scheme.lower() != b"bearer" or not matches:
            message = "the API key is missing or wrong; send Authorization: Bearer KEY"
            challenge = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=challenge)

    async def _read_body(self, receive: Receive) -> bytes:
        """Read a body; raise an `ApiError` if it is too large or takes too long to arrive."""
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self._body_timeout):
                while more:
                    message = await receive()
                    more = message.get("more_body", False)
                    body += message.get("body", b"")
                    if len(body) > self._max_body_bytes:
                        text = f"the body is longer than {self._max_body_bytes} bytes"
                        raise ApiError(413, text, code="request_too_large")
        except TimeoutError:
            text = f"the body did not arrive within {self._body_timeout:g} seconds"
            raise ApiError(408, text, code="request_timeout") from None
        return bytes(body)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
