"""Silent connections are closed, and never take the place of clients that send a request."""

import socket
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from benchmarks.server_throughput import run_server
from ovis_jax.server import connections
from ovis_jax.server.connections import MIN_RECEIVED, TimedProtocol

HEAD = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"


async def echo(scope, receive, send):
    """Answer with the body, after all of it has arrived."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-length", b"%d" % len(body))],
        }
    )
    await send({"type": "http.response.body", "body": body})


@contextmanager
def serve(max_connections: int):
    """Serve `echo`; yields the URL and a function that connects."""
    config = uvicorn.Config(
        echo,
        lifespan="off",
        log_level="warning",
        http=TimedProtocol,
        limit_concurrency=max_connections,
    )
    with run_server(uvicorn.Server(config)) as url, ExitStack() as stack:
        address = "127.0.0.1", int(url.rpartition(":")[2])
        yield url, lambda: stack.enter_context(socket.create_connection(address, 60))


def read_answer(client: socket.socket) -> bytes:
    answer = b""
    while not answer.endswith(b"ok") and (part := client.recv(4096)):
        answer += part
    return answer


def is_closed(client: socket.socket) -> bool:
    """Wait until the server closes the connection."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_new_connection_takes_the_place_of_the_longest_silent_one(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_TIMEOUT", 600.0)
    with serve(max_connections=4) as (url, connect):
        busy = connect()
        busy.sendall(HEAD + b"o")
        silent = [connect() for _ in range(8)]
        with httpx.Client(base_url=url) as client:
            assert client.get("/health").status_code == 200
            busy.sendall(b"k")
            assert read_answer(busy).startswith(b"HTTP/1.1 200")
            assert all(is_closed(other) for other in silent[:6])
            silent[-1].sendall(HEAD + b"ok")  # the newest is still open
            assert read_answer(silent[-1]).startswith(b"HTTP/1.1 200")


def test_a_head_that_does_not_arrive(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_TIMEOUT", 0.0)
    with serve(max_connections=4) as (_, connect):
        for start in (b"", HEAD[:9]):
            client = connect()
            client.sendall(start)
            assert is_closed(client)


class FakeTransport:
    """A transport whose client reads as the test says."""

    def __init__(self):
        self.unsent, self.aborted = 0, False

    def get_write_buffer_size(self):
        return self.unsent

    def abort(self):
        self.aborted = True

    def get_extra_info(self, name):
        return None


@pytest.mark.parametrize("received, aborted", [(MIN_RECEIVED, False), (MIN_RECEIVED - 1, True)])
def test_a_client_that_does_not_read(monkeypatch, received, aborted):
    timers = []

    class Loop:
        def call_later(self, seconds, callback, *arguments):
            timers.append((seconds, lambda: callback(*arguments)))
            return self

        def cancel(self):
            timers.clear()

    config = uvicorn.Config(echo, http=TimedProtocol, limit_concurrency=4)
    protocol = TimedProtocol(config, ServerState(), {}, Loop())
    transport = FakeTransport()
    protocol.connection_made(transport)
    assert [seconds for seconds, _ in timers] == [connections.HEAD_TIMEOUT]
    transport.unsent = 10 * MIN_RECEIVED
    protocol.pause_writing()
    ((seconds, expire),) = timers
    assert seconds == connections.WRITE_TIMEOUT
    transport.unsent -= received
    expire()
    assert transport.aborted is aborted
    protocol.resume_writing()
    assert [seconds for seconds, _ in timers] == [connections.HEAD_TIMEOUT]
