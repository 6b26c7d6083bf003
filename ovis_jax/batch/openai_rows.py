"""Answering rows of OpenAI's batch format, with the responses that the server would send."""

import math
import sys
import uuid
from typing import Any

from pydantic import ValidationError

from ovis_jax.batch.answer_in_order import RowResult
from ovis_jax.batch.requests_file import BatchRow
from ovis_jax.engine.request import EventStream
from ovis_jax.engine.scheduler import Scheduler
from ovis_jax.errors import DataError
from ovis_jax.server.errors import ApiError, bad_request, validation_error
from ovis_jax.server.preprocess import Preprocessor, RequestLimits
from ovis_jax.server.request_schema import ChatRequest
from ovis_jax.server.responses import ResponseFormatter

EXPECTED_FIELDS = {"method": "POST", "url": "/v1/chat/completions"}


class OpenAIRows:
    """Answers rows of OpenAI's batch format.

    Args:
      scheduler: The engine.
      served_model_name: Name of the model in requests.
      seed: Sampling seed of requests that do not set a seed.
      max_new_tokens: Maximum number of tokens per answer.
      max_partition: Maximum number of cells that an image is split into.
      allow_remote_images: Whether to fetch images from other servers.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        served_model_name: str,
        seed: int,
        max_new_tokens: int,
        max_partition: int,
        allow_remote_images: bool,
    ):
        self._scheduler, self._model_name, self._seed = scheduler, served_model_name, seed
        # The user's own file needs no limits on images, and there is no client that waits.
        limits = RequestLimits(
            max_images=sys.maxsize,
            max_pixels=sys.maxsize,
            max_image_pixels=sys.maxsize,
            max_tokens=max_new_tokens,
            request_timeout=math.inf,
            max_partition=max_partition,
            allow_remote_images=allow_remote_images,
        )
        self._preprocessor = Preprocessor(
            scheduler.processor, limits, scheduler.max_model_len, scheduler.max_num_seqs
        )

    async def answer(self, row: BatchRow) -> RowResult:
        """Answer one row. If the body is invalid, the response has the status 400 or 404.

        Raises:
          DataError: The row is malformed.
          EngineError: The model failed.
        """
        body = _request_body(row.fields)
        try:
            status, (response, num_tokens) = 200, await self._complete(body)
        except ApiError as error:
            status, response, num_tokens = error.status_code, error.body(), 0
        found = {"status_code": status, "request_id": uuid.uuid4().hex, "body": response}
        return RowResult(_result(row, found, None), num_tokens)

    def error_result(self, row: BatchRow, message: str, code: str) -> dict[str, Any]:
        """Return the result of a row that has no response."""
        return _result(row, None, {"code": code, "message": message})

    @staticmethod
    def has_failed(result: dict[str, Any]) -> bool:
        """Return whether a result is an error."""
        return result["response"] is None or result["response"]["status_code"] != 200

    async def _complete(self, fields: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Return the response to a request body, and the number of generated tokens."""
        try:
            body = ChatRequest.model_validate(fields)
        except ValidationError as error:
            errors = [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]
            raise validation_error(errors, None) from None
        if body.model != self._model_name:
            message = f"model: {body.model!r} is not the model of this run, {self._model_name!r}"
            message += "; --served-model-name gives it another name"
            raise ApiError(404, message, param="model", code="model_not_found")
        if body.stream:
            raise bad_request("stream", "expected false or null in a file of requests")
        if body.seed is None:
            body = body.model_copy(update={"seed": self._seed})
        events = EventStream()
        request = await self._preprocessor.preprocess(body, events.put)
        self._scheduler.submit(request)
        deltas = [delta async for delta in events.deltas(request.num_choices)]
        tokenizer = self._scheduler.processor.tokenizer
        formatter = ResponseFormatter(self._model_name, request, tokenizer)
        return formatter.completion(deltas), request.completion_tokens


def _request_body(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the request body of a row.

    Raises:
      DataError: A field of the row is missing or has an unsupported value.
    """
    if not isinstance(fields.get("custom_id"), str):
        raise DataError(f"custom_id is {fields.get('custom_id')!r:.100}, expected a string")
    for key, expected in EXPECTED_FIELDS.items():
        if fields.get(key) != expected:
            raise DataError(f"{key} is {fields.get(key)!r:.100}, expected {expected!r}")
    if not isinstance(fields.get("body"), dict):
        raise DataError(f"body is {fields.get('body')!r:.100}, expected an object")
    return fields["body"]


def _result(row: BatchRow, response: Any, error: Any) -> dict[str, Any]:
    custom_id = row.value.get("custom_id") if isinstance(row.value, dict) else None
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
