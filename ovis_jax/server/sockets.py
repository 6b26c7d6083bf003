"""Binding a server's sockets before the model is loaded, so that a used port is reported early."""

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ovis_jax.errors import OvisError

LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")
"""Hosts that other machines cannot reach."""

UNSUPPORTED_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Errors for an address type that this machine does not support, such as IPv6."""


@contextmanager
def bind_sockets(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Bind a port on every address of a host; clients can connect after the server calls `listen`.

    Args:
      host: An address or a host name.
      port: The port; 0 for any port that is free on every address.

    Raises:
      OvisError: The port is already in use, or the host is not this machine.
    """
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        unsupported: OSError | None = None
        try:
            for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                family, kind, protocol, _, (address, _, *more) = info
                try:
                    bound = stack.enter_context(socket.socket(family, kind, protocol))
                    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    bound.bind((address, port, *more))
                except OSError as error:
                    if error.errno not in UNSUPPORTED_ADDRESS:
                        raise
                    unsupported = error
                else:
                    port = bound.getsockname()[1]
                    sockets.append(bound)
            if unsupported and not sockets:
                raise unsupported
        except OSError as error:
            raise OvisError(
                f"cannot listen on {http_url(host, port)}: {error.strerror}; "
                "set another --port or --host"
            ) from error
        yield sockets


def http_url(host: str, port: int) -> str:
    """Return the URL of a server; an IPv6 address is put in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
