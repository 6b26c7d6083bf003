"""Where a server listens, and how it stops."""

import asyncio
import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import uvicorn

from ovis_jax.errors import OvisError
from ovis_jax.serving.engine import Engine

NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""An address of a kind that this machine does not have, such as IPv6."""


@contextmanager
def bound(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Take a port at each address of a host; nobody can connect before a server runs on it.

    Raises:
      OvisError: the port is taken, or the host is not one of this machine.
    """
    with ExitStack() as stack:
        listeners: list[socket.socket] = []
        missing: OSError | None = None
        try:
            for kind in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                try:
                    listener = _bind(kind, port, stack)
                except OSError as error:
                    if error.errno not in NOT_HERE:
                        raise
                    missing = error
                else:
                    port = port_of(listener)  # the others' too, where any free one will do
                    listeners.append(listener)
            if missing and not listeners:
                raise missing
        except OSError as error:
            raise OvisError(
                f"{url(host, port)} cannot be listened at: {error.strerror}; "
                "give another --port or --host"
            ) from error
        yield listeners


def _bind(kind: Any, port: int, stack: ExitStack) -> socket.socket:
    family, type_, protocol, _, (host, _, *more) = kind
    listener = stack.enter_context(socket.socket(family, type_, protocol))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind((host, port, *more))
    return listener


def port_of(listener: socket.socket) -> int:
    """The port that was taken."""
    return listener.getsockname()[1]


def url(host: str, port: int) -> str:
    """An address as browsers write it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class DrainingServer(uvicorn.Server):
    """Lets its engine finish before it stops listening.

    So while it shuts down it still says so: /health and new requests get 503. A second Ctrl-C ends
    it at once.

    Args:
      config: of the server.
      engine: what its application answers with.
      drain: seconds that the engine may take.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, drain: float):
        super().__init__(config)
        self._engine, self._drain = engine, drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the engine, then the connections."""
        close = self._engine.close
        closing = threading.Thread(target=close, args=(self._drain,), daemon=True)
        closing.start()
        while closing.is_alive() and not self.force_exit:
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)
