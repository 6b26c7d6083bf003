"""Silent connections are closed, and never take the place of clients that send a request."""

import asyncio
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


def test_an_idle_connection_is_kept_longer_than_by_clients(monkeypatch):
    """Otherwise, a client sends a request while the server closes the connection."""
    by_httpx = httpx.Limits().keepalive_expiry
    assert by_httpx is not None and by_httpx < connections.KEEP_ALIVE_TIMEOUT
    monkeypatch.setattr(connections, "KEEP_ALIVE_TIMEOUT", 0.0)
    with serve(max_connections=4) as (_, connect):
        client = connect()
        client.sendall(HEAD + b"ok")
        assert read_answer(client).startswith(b"HTTP/1.1 200")
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
    assert [seconds for seconds, _ in timers] == [connections.KEEP_ALIVE_TIMEOUT]


async def refuse(scope, receive, send):
    """Answer without reading the body."""
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


def test_a_client_that_sends_its_body_before_it_reads_the_refusal():
    size = 2**24
    config = uvicorn.Config(refuse, lifespan="off", log_level="warning", http=TimedProtocol)
    with run_server(uvicorn.Server(config)) as url:
        response = httpx.post(url, content=bytes(size), timeout=600)
        assert (response.status_code, response.text) == (413, "ok")


def test_bodies_that_were_refused_are_read_in_turn(monkeypatch):
    """However many clients keep sending, one read per interval is all they get."""
    monkeypatch.setattr(connections, "DISCARD_INTERVAL", 1000.0)
    monkeypatch.setattr(TimedProtocol, "_next_discard", 0.0)

    class Transport(FakeTransport):
        def __init__(self):
            super().__init__()
            self.is_reading = True

        def write(self, data):
            pass

        def is_closing(self):
            return False

        def pause_reading(self):
            self.is_reading = False

        def resume_reading(self):
            self.is_reading = True

    async def send_bodies():
        loop = asyncio.get_running_loop()
        config = uvicorn.Config(refuse, http=TimedProtocol)
        transports = [Transport() for _ in range(3)]
        for transport in transports:
            protocol = TimedProtocol(config, ServerState(), {}, loop)
            protocol.connection_made(transport)
            protocol.data_received(HEAD.replace(b": 2", b": 9"))
            await asyncio.gather(*protocol.tasks)
            assert transport.is_reading
            turns.append(TimedProtocol._next_discard - loop.time())
            protocol.data_received(b"123")
            assert not transport.is_reading

    turns: list[float] = []
    asyncio.run(send_bodies())
    assert [round(turn, -2) for turn in turns[1:]] == [1000, 2000]
