"""Answering many rows at a time, with the results in the order of the rows."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from ovis_jax.batch.requests_file import BatchRow
from ovis_jax.engine.request import EngineError
from ovis_jax.engine.scheduler import REQUEST_FAILED
from ovis_jax.errors import OvisError

log = logging.getLogger(__name__)


class RowResult(NamedTuple):
    """A row's result as it is written to the results file, and the number of generated tokens."""

    value: dict[str, Any]
    num_tokens: int


class RowAnswerer(Protocol):
    """Answers the rows of one format."""

    async def answer(self, row: BatchRow) -> RowResult:
        """Answer one row.

        Raises:
          OvisError: The row cannot be answered.
        """
        ...

    def error_result(self, row: BatchRow, message: str, code: str) -> dict[str, Any]:
        """Return the result of a row that cannot be answered."""
        ...


async def answer_in_order(
    answerer: RowAnswerer,
    rows: Iterable[BatchRow],
    *,
    max_concurrent: int,
    on_answered: Callable[[int], None],
    on_result: Callable[[dict[str, Any]], None],
) -> None:
    """Answer rows concurrently. A row that fails does not stop the others.

    A row is read only after another row has been answered, so at most `max_concurrent` rows have
    their images in memory. Results that wait for an earlier row are kept in memory, too, but are
    small.

    Args:
      answerer: Answers each row.
      rows: The rows.
      max_concurrent: Maximum number of rows that are being prepared, are waiting or are being
        answered.
      on_answered: Called after each row is answered, with the number of generated tokens.
      on_result: Called with each result in the order of the rows.

    Raises:
      EngineError: The model failed. The results so far remain valid.
    """
    free = asyncio.Semaphore(max_concurrent)
    tasks: deque[asyncio.Task[dict[str, Any]]] = deque()

    async def answer(row: BatchRow) -> dict[str, Any]:
        try:
            result = await _answer_or_error(answerer, row)
        finally:
            free.release()
        on_answered(result.num_tokens)
        return result.value

    try:
        async with asyncio.TaskGroup() as group:  # ends all rows if the model fails
            for row in rows:
                await free.acquire()
                tasks.append(group.create_task(answer(row)))
                del row  # with its images
                while tasks and tasks[0].done():
                    on_result(tasks.popleft().result())
            while tasks:
                on_result(await tasks.popleft())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _answer_or_error(answerer: RowAnswerer, row: BatchRow) -> RowResult:
    try:
        return await answerer.answer(row)
    except Exception as error:
        code, message = "invalid_row", str(error)
        if isinstance(error, EngineError):
            if error.failure != REQUEST_FAILED:  # the row is not the cause
                raise
            code, message = error.failure.code, "the model failed on this row"
        elif not isinstance(error, OvisError):  # one row must not end a run of many hours
            log.exception("%s failed; the others continue", row.name)
            code, message = "internal_error", f"internal error: {error!r}"
        return RowResult(answerer.error_result(row, f"{row.name}: {message}", code), 0)
