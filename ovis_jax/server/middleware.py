"""Checks before a request body is parsed: the API key, and limits that protect other requests."""

import asyncio
import hashlib
import hmac
import ipaddress
import json
from collections import Counter
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ovis_jax.server.errors import ApiError

PROTECTED = ("/v1/", "/tokenize")
"""Prefixes of the paths that need the API key and whose requests are limited."""

MAX_JSON_VALUES = 2**15
"""Maximum number of list items and object fields in a body."""

RETRY = {"Retry-After": "1"}


class AuthAndLimitsMiddleware:
    """ASGI middleware that checks requests to /v1 and /tokenize, and counts the responses.

    Requests to all other paths are answered at once, however many there are, because their bodies
    are not read and the answers are short.

    FastAPI's `max_body_size` is not used, because it would reject a large body before the API key
    is checked, and it would respond in plain text instead of the API's error format.

    Args:
      app: The application.
      api_key: API key that clients must send; None for a server without a key.
      max_body_bytes: Maximum size of a body in bytes.
      max_total_body_bytes: Maximum size of the bodies of all requests that are being received or
        answered, in bytes. One client may use half of it.
      body_timeout: Maximum time until a body has arrived, in seconds.
      max_requests: Maximum number of requests that are being received or answered.
      max_requests_per_client: Maximum number of these requests from one client.
      on_response: Called with the HTTP status of each response.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        max_body_bytes: int,
        max_total_body_bytes: int,
        body_timeout: float,
        max_requests: int,
        max_requests_per_client: int,
        on_response: Callable[[int], None],
    ):
        self._app, self._on_response = app, on_response
        self._max_body_bytes, self._body_timeout = max_body_bytes, body_timeout
        self._max_total_body_bytes = max(max_total_body_bytes, max_body_bytes)
        self._max_requests, self._max_requests_per_client = max_requests, max_requests_per_client
        self._key_digest = None if api_key is None else _digest(api_key.encode())
        self._requests: Counter[str] = Counter()  # by client
        self._body_bytes: Counter[str] = Counter()  # by client

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

        client, headers = client_network(scope), dict(scope["headers"])
        size = 0

        def count_bytes(number: int) -> None:
            nonlocal size
            size += number
            self._body_bytes[client] += number
            self._check_body_size(client, size)

        self._requests[client] += 1
        try:
            try:
                self._check_api_key(headers)
                self._check_num_requests(client)
                self._check_body_size(client, _content_length(headers), new=True)
                body = await self._read_body(receive, count_bytes)
                check_json_size(body)
            except ApiError as error:
                await error.response()(scope, receive, counted)
                return
            except ClientDisconnect:
                return

            messages: list[Message] = [{"type": "http.request", "body": body}]
            del body

            async def receive_body() -> Message:
                return messages.pop() if messages else await receive()

            try:
                await self._app(scope, receive_body, counted)
            except Exception:  # the 500 response is sent outside this middleware
                if not started:
                    self._on_response(500)
                raise
        finally:
            self._requests -= Counter({client: 1})  # this also removes clients without requests
            self._body_bytes -= Counter({client: size})

    def _check_num_requests(self, client: str) -> None:
        """Raise an `ApiError` if there are too many requests, including this one."""
        if self._requests[client] > self._max_requests_per_client:
            message = (
                f"the client {client} has {self._requests[client] - 1} other requests, the maximum;"
                " --max-requests-per-client raises it"
            )
            raise ApiError(429, message, code="too_many_requests", headers=RETRY)
        if self._requests.total() > self._max_requests:
            message = (
                f"{self._max_requests} requests are being received or answered, the maximum;"
                " --max-queued-requests raises it"
            )
            raise ApiError(503, message, code="too_many_requests", headers=RETRY)

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

    async def _read_body(self, receive: Receive, count_bytes: Callable[[int], None]) -> bytes:
        """Read a body.

        Raises:
          ApiError: `count_bytes` raised it, or the body took too long to arrive.
          ClientDisconnect: The client closed the connection.
        """
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self._body_timeout):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    more = message.get("more_body", False)
                    part = message.get("body", b"")
                    body += part
                    count_bytes(len(part))
        except TimeoutError:
            text = (
                f"the body did not arrive within {self._body_timeout:g} seconds;"
                " --body-timeout raises this limit"
            )
            raise ApiError(408, text, code="request_timeout") from None
        return bytes(body)

    def _check_body_size(self, client: str, size: int, *, new: bool = False) -> None:
        """Raise an `ApiError` if a body is too large; a `new` body has not been counted yet."""
        if size > self._max_body_bytes:
            text = (
                f"the body is longer than {self._max_body_bytes} bytes, the maximum;"
                " --max-body-bytes raises it"
            )
            raise ApiError(413, text, code="request_too_large")
        own = self._body_bytes[client] + size * new
        total = self._body_bytes.total() + size * new
        limit = self._max_total_body_bytes
        if total > limit or own > max(limit // 2, self._max_body_bytes):
            text = (
                f"the bodies of all requests are longer than {limit} bytes, or those of the client"
                f" {client} than half of that; try again later, or raise --max-total-body-bytes"
            )
            raise ApiError(503, text, code="too_many_body_bytes", headers=RETRY)


def check_json_size(body: bytes) -> None:
    """Check that a JSON body has few list items and object fields; strings may be long.

    Python's parser, Pydantic and the application take microseconds and kilobytes per item, in the
    thread of the event loop: 700,000 items in a body of 18 MB block all clients for 12 seconds.
    This check scans the body in C.

    Raises:
      ApiError: The body has more than `MAX_JSON_VALUES` items and fields (status 400).
    """
    try:
        text = body.decode(json.detect_encoding(body), "surrogatepass")
    except UnicodeDecodeError:
        return  # parsing the body raises the same error
    if "\\" in text:
        text = text.replace("\\\\", "").replace('\\"', "")
    number = text.count('"') // 4  # a field has at most two strings
    if number <= MAX_JSON_VALUES:
        outside_strings = "".join(text.split('"')[::2])
        number = sum(map(outside_strings.count, ",[{"))
    if number > MAX_JSON_VALUES:
        message = (
            f"the body has about {number} list items and object fields, but the maximum is"
            f" {MAX_JSON_VALUES}; send fewer messages and content parts"
        )
        raise ApiError(400, message, code="too_many_values")


def client_network(scope: Scope) -> str:
    """Return the address of a client; for IPv6, the /64 network that usually has a single client.

    Behind a reverse proxy that uvicorn trusts, the address is that in the header X-Forwarded-For.
    """
    host = (scope.get("client") or ("unknown", 0))[0]
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return host
    return str(ipaddress.ip_network((address, 64), strict=False))


def _content_length(headers: dict[bytes, bytes]) -> int:
    """Return the Content-Length, which the HTTP parser has checked, or 0 if it is missing."""
    value = headers.get(b"content-length", b"")
    return int(value) if value.isdigit() else 0


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
