"""Threads that decode images, starting with the request with the fewest pixels."""

import asyncio
import heapq
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

R = TypeVar("R")


class ImageThreads:
    """Runs functions in threads; of the waiting functions, the one with the fewest pixels is next.

    A `ThreadPoolExecutor` alone runs its functions in order of arrival. A few huge images would
    then delay everyone else's small images by minutes.

    Args:
      num_threads: Maximum number of functions that run at the same time.
    """

    def __init__(self, num_threads: int):
        self._threads, self._num_free = ThreadPoolExecutor(num_threads), num_threads
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    async def run(self, num_pixels: int, function: Callable[..., R], *arguments: Any) -> R:
        """Return the result of `function(*arguments)`, which handles `num_pixels` pixels."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        heapq.heappush(self._waiting, (num_pixels, next(self._arrivals), turn))
        self._start_next()
        try:
            await turn
            return await loop.run_in_executor(self._threads, function, *arguments)
        finally:
            if not turn.cancelled():
                self._num_free += 1
                self._start_next()

    def _start_next(self) -> None:
        while self._num_free and self._waiting:
            *_, turn = heapq.heappop(self._waiting)
            if not turn.cancelled():
                turn.set_result(None)
                self._num_free -= 1
