"""What every request passes before its body is read: the key, the size, the time it may take."""

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ovis_jax.serving.refusals import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


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
