"""Graceful shutdown of the server."""

import asyncio
import socket
import threading
from collections.abc import Sequence

import uvicorn

from ovis_jax.engine.scheduler import Scheduler


class DrainingServer(uvicorn.Server):
    """A server that finishes running requests before it stops listening.

    Meanwhile, /health and new requests receive a 503 response. A second Ctrl-C stops the server
    immediately.

    Args:
      config: Configuration of the server.
      schedulers: The engines that the application uses.
      shutdown_timeout: Maximum time for running requests to finish, in seconds.
    """

    def __init__(
        self, config: uvicorn.Config, schedulers: Sequence[Scheduler], shutdown_timeout: float
    ):
        super().__init__(config)
        self._schedulers, self._shutdown_timeout = schedulers, shutdown_timeout

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the engines, all at the same time, and then the connections."""
        closing = [
            threading.Thread(target=scheduler.close, args=(self._shutdown_timeout,), daemon=True)
            for scheduler in self._schedulers
        ]
        for thread in closing:
            thread.start()
        while any(thread.is_alive() for thread in closing) and not self.force_exit:
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)
