"""Answering plain rows, `{"image": IMAGES, "prompt": TEXT}`, as `ovis-jax generate` does."""

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ovis_jax.batch.answer_in_order import RowResult
from ovis_jax.batch.requests_file import BatchRow
from ovis_jax.engine.request import Delta, EventStream, Failure, Request
from ovis_jax.engine.scheduler import Scheduler
from ovis_jax.errors import DataError
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.dataset import parse_images, read_image_source, require_text
from ovis_jax.inputs.open_image import open_image

MAX_THREADS = 4
"""Maximum number of rows whose images are decoded at the same time."""

RESULT_KEYS = ("answer", "finish_reason", "error")
"""The fields that a result adds to its row: `answer` and `finish_reason`, or `error` on failure."""


class PlainRows:
    """Answers plain rows. A result has the fields of its row and some of `RESULT_KEYS`.

    Args:
      scheduler: The engine.
      folder: The folder that image paths are relative to.
      prompt: Prompt for rows without the field `prompt`; None if every row must have this field.
      sampling: Sampling parameters.
      seed: Sampling seed.
      max_new_tokens: Maximum number of tokens per answer.
      max_partition: Maximum number of cells that an image is split into.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        folder: Path,
        *,
        prompt: str | None,
        sampling: Sampling,
        seed: int,
        max_new_tokens: int,
        max_partition: int,
    ):
        self._scheduler, self._folder, self._prompt = scheduler, folder, prompt
        self._sampling, self._seed = sampling, seed
        self._max_new_tokens, self._max_partition = max_new_tokens, max_partition
        self._threads = ThreadPoolExecutor(MAX_THREADS)

    async def answer(self, row: BatchRow) -> RowResult:
        """Answer one row.

        Raises:
          OvisError: The row is malformed, an image cannot be read, or the prompt is too long.
          EngineError: The model failed.
        """
        events, loop = EventStream(), asyncio.get_running_loop()
        request = await loop.run_in_executor(self._threads, self._make_request, row, events.put)
        self._scheduler.submit(request)
        (delta,) = [delta async for delta in events.deltas(1)]
        answer = {"answer": delta.text, "finish_reason": delta.finish_reason}
        return RowResult({**row.fields, **answer}, request.completion_tokens)

    def error_result(self, row: BatchRow, message: str, code: str) -> dict[str, Any]:
        """Return the result of a row that failed."""
        fields = row.value if isinstance(row.value, dict) else {}
        return {**fields, "error": message}

    @staticmethod
    def has_failed(result: dict[str, Any]) -> bool:
        """Return whether a result is an error."""
        return "error" in result

    def _make_request(self, row: BatchRow, on_event: Callable[[Delta | Failure], None]) -> Request:
        fields = row.fields
        if taken := [key for key in RESULT_KEYS if key in fields]:
            raise DataError(f"the row already has the field {taken[0]!r}; rename it")
        if fields.get("prompt") is None:
            if self._prompt is None:
                raise DataError("prompt is missing; add it to the row, or give --prompt")
            fields = {**fields, "prompt": self._prompt}
        sources = map(read_image_source, parse_images(fields, self._folder))
        images = [open_image(source) for source in sources]
        example = self._scheduler.processor.encode(
            require_text(fields, "prompt"),
            images,
            max_partition=self._max_partition,
            max_length=self._scheduler.max_model_len - 1,
        )
        room = self._scheduler.max_model_len - len(example.tokens)
        request = Request(
            tokens=example.tokens,
            pixels=example.pixels,
            sampling=self._sampling,
            seed=self._seed % 2**64,
            max_new_tokens=min(self._max_new_tokens, room),
            deadline=math.inf,
            on_event=on_event,
            stream=False,
        )
        if self._scheduler.reuses_requests:
            _ = request.crop_digests  # computes them in this thread
        return request
