"""Closing the connections of silent clients, so that other clients can always connect."""

import asyncio
import itertools
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT = 10.0
"""Maximum time from connecting until the head of the first request has arrived, in seconds."""

KEEP_ALIVE_TIMEOUT = 75.0
"""Maximum time from a response until the head of the next request has arrived, in seconds. It must
be longer than clients keep idle connections. uvicorn's 5 seconds are as long as httpx, and so the
OpenAI client, keeps them: a request that is sent just then meets a closed connection."""

WRITE_TIMEOUT = 30.0
"""Maximum time for a client to receive `MIN_RECEIVED` bytes that are ready, in seconds."""

MIN_RECEIVED = 2**14

DISCARD_INTERVAL = 0.001
"""Time between two reads, over all connections, of bodies whose request is already answered, in
seconds. A read is at most 256 KiB. Without this limit, clients that keep sending after they were
refused would take most of the event loop's time."""

SPARE_CONNECTIONS = 64
"""Number of connections in addition to the maximum number of requests. The spare connections are
for /health and /metrics while the server has the maximum number of requests."""

ORDER = itertools.count()
"""Numbers the waits in the order in which they begin. The event loop's time is not used for this,
because many waits can begin at the same time."""


class TimedProtocol(H11Protocol):
    """An HTTP/1.1 connection with time limits, which may be closed to make room for a new one.

    uvicorn has no time limit for the head of a request or for a client that does not read. Its
    `limit_concurrency` counts silent connections and rejects requests to every path, so that a few
    hundred silent connections make /health fail. Here, `limit_concurrency` is the maximum number of
    open connections. When a new connection exceeds this maximum, the connection that has waited
    longest for the head of a request is closed. The number of requests is limited by
    `AuthAndLimitsMiddleware`.
    """

    _next_discard: ClassVar[float] = 0.0
    """The event loop's time at which the next connection may discard a part of a body."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None
        self.timeout_keep_alive = KEEP_ALIVE_TIMEOUT
        self._waiting_since = next(ORDER)
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waits_for_head(self) -> bool:
        """Whether no request is being received or answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        """Start the timeout for the first head, and close a connection if there are too many."""
        super().connection_made(transport)
        self._start_timer(HEAD_TIMEOUT)
        if self._max_connections is not None and len(self.connections) > self._max_connections:
            self._close_longest_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timeout."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Stop the timeout once a head has arrived; the middleware has a timeout for the body."""
        super().data_received(data)
        if not self.waits_for_head and not self.flow.write_paused:
            self._stop_timer()
        if self.waits_for_head and self.conn.their_state is h11.SEND_BODY:
            self._wait_to_discard()

    def on_response_complete(self) -> None:
        """Start the timeout for the next head, unless it has already arrived."""
        self._waiting_since = next(ORDER)
        if not self.flow.write_paused:
            self._start_timer(KEEP_ALIVE_TIMEOUT)
        super().on_response_complete()
        if not self.waits_for_head and not self.flow.write_paused:
            self._stop_timer()

    def pause_writing(self) -> None:
        """Start the timeout for the client to receive the bytes that are ready."""
        super().pause_writing()
        self._start_timer(WRITE_TIMEOUT)

    def resume_writing(self) -> None:
        """Stop the timeout for receiving; if no request is open, start that for the next head."""
        super().resume_writing()
        self._stop_timer()
        if self.waits_for_head:
            self._start_timer(KEEP_ALIVE_TIMEOUT)

    def _wait_to_discard(self) -> None:
        """Stop to read the rest of an answered request's body until it is this connection's turn.

        The rest is read at all because many clients read the response only after sending the body.
        """
        now = self.loop.time()
        turn = max(now, TimedProtocol._next_discard)
        TimedProtocol._next_discard = turn + DISCARD_INTERVAL
        self.transport.pause_reading()
        self.loop.call_later(turn - now, self.transport.resume_reading)

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        unsent = self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(seconds, self._on_timeout, unsent)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self, unsent_before: int) -> None:
        """Close the connection, unless the client is still receiving."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent_before - unsent >= MIN_RECEIVED:
            self._start_timer(WRITE_TIMEOUT)
        else:
            self.transport.abort()

    def _close_longest_waiting(self) -> None:
        timed = (other for other in self.connections if isinstance(other, TimedProtocol))
        waiting = [other for other in timed if other.waits_for_head]
        oldest = min(waiting, key=lambda other: other._waiting_since)
        self.connections.discard(oldest)  # at once, because `connection_lost` is called later
        oldest.transport.abort()
