"""Graceful shutdown of the server."""

import asyncio
import socket
import threading

import uvicorn

from ovis_jax.engine.scheduler import Scheduler


class DrainingServer(uvicorn.Server):
    """A server that finishes running requests before it stops listening.

    Meanwhile, /health and new requests receive a 503 response. A second Ctrl-C stops the server
    immediately.

    Args:
      config: Configuration of the server.
      scheduler: The engine that the application uses.
      shutdown_timeout: Maximum time for running requests to finish, in seconds.
    """

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, shutdown_timeout: float):
        super().__init__(config)
        self._scheduler, self._shutdown_timeout = scheduler, shutdown_timeout

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the engine, and then the connections."""
        closing = threading.Thread(
            target=self._scheduler.close, args=(self._shutdown_timeout,), daemon=True
        )
        closing.start()
        while closing.is_alive() and not self.force_exit:
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)
