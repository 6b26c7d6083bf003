"""Checks before a body is parsed: its size, its time, and the number of requests of a client."""

import asyncio
import json

import pytest

from ovis_jax.server.errors import ApiError
from ovis_jax.server.middleware import (
    MAX_JSON_VALUES,
    AuthAndLimitsMiddleware,
    check_json_size,
    client_network,
)

LIMITS = {
    "api_key": None,
    "max_body_bytes": 100,
    "max_total_body_bytes": 300,
    "body_timeout": 60.0,
    "max_requests": 3,
    "max_requests_per_client": 2,
}


class Requests:
    """Requests to a middleware whose application answers when the test says.

    Attributes:
      app: The application, which reads nothing.
      bodies: The bodies that reached it.
    """

    def __init__(self, **limits):
        self.bodies, self.may_answer, self.counted = [], asyncio.Event(), []

        async def app(scope, receive, send):
            self.bodies.append((await receive())["body"])
            await self.may_answer.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})

        self.middleware = AuthAndLimitsMiddleware(
            app, on_response=self.counted.append, **(LIMITS | limits)
        )

    async def send(self, client, *parts, length=None, silent=False):
        """Send a request; return the status, the headers and the error of the response.

        Each part is a part of the body; None closes the connection.
        """
        sent, left = (
            [],
            [
                {"type": "http.request", "body": part, "more_body": True}
                if part is not None
                else {"type": "http.disconnect"}
                for part in parts
            ],
        )
        left += [] if silent else [{"type": "http.request", "body": b""}]

        async def receive():
            return left.pop(0) if left else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        headers = [] if length is None else [(b"content-length", b"%d" % length)]
        scope = {"type": "http", "path": "/v1/chat/completions", "headers": headers}
        await self.middleware(scope | {"client": (client, 9)}, receive, send)
        if not sent:
            return 0, {}, None
        return sent[0]["status"], dict(sent[0]["headers"]), json.loads(sent[1]["body"]).get("error")

    def start(self, *arguments, **options):
        return asyncio.create_task(self.send(*arguments, **options))


async def settle():
    """Let all tasks run until they wait."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_body_that_does_not_arrive_in_time():
    async def run():
        requests = Requests(body_timeout=0.0)
        status, _, error = await requests.send("a", silent=True)
        assert (status, error["code"], requests.counted) == (408, "request_timeout", [408])
        assert "--body-timeout" in error["message"] and requests.bodies == []

    asyncio.run(run())


def test_requests_at_the_same_time():
    """One client cannot take the places of the others, also if its requests never arrive."""

    async def run():
        requests = Requests()
        first = [requests.start("a"), requests.start("a", silent=True)]
        await settle()
        status, headers, error = await requests.send("a")
        assert (status, error["code"]) == (429, "too_many_requests")
        assert headers[b"retry-after"] == b"1" and "--max-requests-per-client" in error["message"]
        first.append(requests.start("b"))
        await settle()
        status, headers, error = await requests.send("c")
        assert (status, error["code"]) == (503, "too_many_requests")
        assert headers[b"retry-after"] == b"1" and "--max-queued-requests" in error["message"]
        requests.may_answer.set()
        assert (await first[0])[0] == (await first[2])[0] == (await requests.send("c"))[0] == 200
        first[1].cancel()
        await asyncio.gather(*first, return_exceptions=True)
        assert not requests.middleware._requests and not requests.middleware._body_bytes

    asyncio.run(run())


def test_bodies_at_the_same_time():
    async def run():
        requests = Requests(max_requests=9, max_requests_per_client=9)
        started = [
            requests.start("a", b"x" * 90),
            requests.start("a", b"x" * 50, silent=True),
            requests.start("b", b"x" * 90, length=90),
        ]
        await settle()
        # The header is enough to reject a body. A body without it is rejected while it arrives.
        for client, body, length, status, code in [
            ("a", b"x", 101, 413, "request_too_large"),
            ("a", b"x" * 101, None, 413, "request_too_large"),
            ("a", b"", 20, 503, "too_many_body_bytes"),
            ("a", b"x" * 20, None, 503, "too_many_body_bytes"),
            ("c", b"", 80, 503, "too_many_body_bytes"),
            ("c", b"x" * 80, None, 503, "too_many_body_bytes"),
        ]:
            silent = length is not None
            got, headers, error = await requests.send(client, body, length=length, silent=silent)
            assert (got, error["code"]) == (status, code)
            assert status == 413 or headers[b"retry-after"] == b"1"
        assert await requests.send("c", b"x" * 60, None) == (0, {}, None)
        requests.may_answer.set()
        assert (await requests.send("c", b"x" * 60))[0] == 200
        assert (await started[0])[0] == (await started[2])[0] == 200
        started[1].cancel()
        await asyncio.gather(*started, return_exceptions=True)
        assert requests.bodies == [b"x" * 90, b"x" * 90, b"x" * 60]
        assert not requests.middleware._requests and not requests.middleware._body_bytes

    asyncio.run(run())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_body_with_too_many_values(encoding):
    """Commas and brackets in a string are text, also after escaped quotes and backslashes."""
    text = [',[{"\\'] * MAX_JSON_VALUES + ["\u2222"]
    check_json_size(json.dumps({"a\\": "".join(text)}, ensure_ascii=False).encode(encoding))
    for item in ([1], {"a": 1}, [], "a", 1):
        items = [item] * MAX_JSON_VALUES
        check_json_size(json.dumps(['\\",', *items[: MAX_JSON_VALUES // 2 - 9]]).encode(encoding))
        with pytest.raises(ApiError, match=f"but the maximum is {MAX_JSON_VALUES}") as caught:
            check_json_size(json.dumps(['\\",', *items]).encode(encoding))
        assert caught.value.code == "too_many_values"


@pytest.mark.parametrize(
    "address, network",
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
    ],
)
def test_the_client_of_a_request(address, network):
    assert client_network({"client": (address, 1)}) == network
    assert client_network({"client": None}) == "unknown"
