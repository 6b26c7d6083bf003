"""The HTTP application: routes of the chat-completions API over the engine."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException

from ovis_jax.engine.request import Delta, Failure, Request
from ovis_jax.engine.scheduler import EngineClosedError, QueueFullError, Scheduler
from ovis_jax.inputs.processor import Processor
from ovis_jax.server.errors import ApiError, ErrorBody, validation_error
from ovis_jax.server.host_check import HostCheckMiddleware
from ovis_jax.server.metrics import ServerMetrics
from ovis_jax.server.middleware import AuthAndLimitsMiddleware
from ovis_jax.server.preprocess import Preprocessor, RequestLimits
from ovis_jax.server.request_schema import ChatRequest
from ovis_jax.server.responses import ResponseFormatter

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "model": ErrorBody}
    for status, description in {
        400: "The request cannot be answered.",
        401: "The API key is missing or wrong.",
        403: "The Host header names another host.",
        404: "The model does not exist.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        422: "The body does not match the schema.",
        429: "Too many requests are waiting.",
        503: "The server is shutting down, its model failed, or the request took too long.",
    }.items()
}

SHUTDOWN_GRACE = 10
"""Time after the shutdown timeout in which open requests receive a 503, in seconds."""

Events = asyncio.Queue[Delta | Failure]


@dataclass(frozen=True)
class ChatService:
    """Answers chat requests.

    Attributes:
      scheduler: The engine.
      preprocessor: Converts bodies to requests to the engine.
      model_name: Name of the model in requests.
      shutdown_timeout: Time that streams may take during a shutdown, in seconds.
      metrics: Metrics of the server.
    """

    scheduler: Scheduler
    preprocessor: Preprocessor
    model_name: str
    shutdown_timeout: float
    metrics: ServerMetrics
    created: int = field(default_factory=lambda: int(time.time()))

    async def complete(self, body: ChatRequest, http_request: HttpRequest) -> Response:
        """Answer a request with a complete response or a stream."""
        self.check_model(body.model)
        self.scheduler.check_accepting()  # before the images are decoded
        arrival_time = time.monotonic()
        loop, events = asyncio.get_running_loop(), Events()

        def on_event(event: Delta | Failure) -> None:
            with suppress(RuntimeError):  # the loop is closed, so the client is gone
                loop.call_soon_threadsafe(events.put_nowait, event)

        request = await self.preprocessor.preprocess(body, on_event)
        self.scheduler.submit(request)
        tokenizer = self.preprocessor.processor.tokenizer
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        formatter = ResponseFormatter(self.model_name, request, tokenizer, include_usage)
        if not request.stream:
            return await self._respond(formatter, events, http_request, arrival_time)

        async def on_close(message: Any) -> None:
            self.scheduler.abort(request)  # also if the stream has not started

        return EventSourceResponse(
            self._stream(formatter, events, arrival_time),
            sep="\n",
            client_close_handler_callable=on_close,
            shutdown_event=anyio.Event(),
            shutdown_grace_period=self.shutdown_timeout + SHUTDOWN_GRACE,
        )

    async def _respond(
        self,
        formatter: ResponseFormatter,
        events: Events,
        http_request: HttpRequest,
        arrival_time: float,
    ) -> Response:
        disconnected = asyncio.create_task(_wait_for_disconnect(http_request))
        completed = asyncio.create_task(_all_deltas(events, formatter.request))
        try:
            await asyncio.wait({disconnected, completed}, return_when=asyncio.FIRST_COMPLETED)
            if not completed.done():
                return Response(status_code=499)  # nobody receives it
            return JSONResponse(formatter.completion(completed.result()))
        finally:
            disconnected.cancel()
            completed.cancel()
            self._finish(formatter.request, arrival_time)

    async def _stream(
        self, formatter: ResponseFormatter, events: Events, arrival_time: float
    ) -> AsyncIterator[dict[str, str]]:
        try:
            yield {"data": formatter.first_chunk()}
            async for delta in _deltas(events, formatter.request):
                for chunk in formatter.delta_chunks(delta):
                    yield {"data": chunk}
            for chunk in formatter.last_chunks():
                yield {"data": chunk}
        except ApiError as error:
            yield {"data": json.dumps(error.body())}
        finally:
            self._finish(formatter.request, arrival_time)

    def _finish(self, request: Request, arrival_time: float) -> None:
        self.scheduler.abort(request)
        self.metrics.record_request(request, arrival_time, time.monotonic())

    def check_model(self, name: str) -> None:
        """Raise an `ApiError` if `name` is not the model's name."""
        if name != self.model_name:
            message = f"model: this server has no {name!r}, only {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def describe_model(self) -> dict[str, Any]:
        """Return the model's entry in the API's list of models."""
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "ovis-jax",
        }


async def _deltas(events: Events, request: Request) -> AsyncIterator[Delta]:
    """Yield deltas until every choice is complete; raise an `ApiError` if the request fails."""
    num_open = request.num_choices
    while num_open:
        event = await events.get()
        if isinstance(event, Failure):
            raise _unavailable(event)
        yield event
        num_open -= event.finish_reason is not None


async def _all_deltas(events: Events, request: Request) -> list[Delta]:
    return [delta async for delta in _deltas(events, request)]


async def _wait_for_disconnect(http_request: HttpRequest) -> None:
    while (await http_request.receive())["type"] != "http.disconnect":
        pass


def _unavailable(failure: Failure) -> ApiError:
    return ApiError(503, failure.message, code=failure.code)


def create_app(
    scheduler: Scheduler,
    processor: Processor,
    model_name: str,
    *,
    limits: RequestLimits | None = None,
    api_key: str | None = None,
    shutdown_timeout: float = 30.0,
    host: str | None = None,
) -> FastAPI:
    """Create the application for one model.

    Args:
      scheduler: The engine, which the application closes when it shuts down.
      processor: Processor of the model.
      model_name: Name of the model in requests.
      limits: Limits on each request.
      api_key: API key that clients must send to paths below /v1; None for an open server.
      shutdown_timeout: Time that running requests may take during a shutdown, in seconds.
      host: Address or name that the server will listen on, for `HostCheckMiddleware`; None disables
        the check.
    """
    limits = limits or RequestLimits()
    preprocessor = Preprocessor(
        processor, limits, scheduler.max_model_len, max_choices=scheduler.max_num_seqs
    )
    metrics = ServerMetrics(
        scheduler.max_num_seqs, lambda: scheduler.num_running, lambda: scheduler.num_waiting
    )
    service = ChatService(scheduler, preprocessor, model_name, shutdown_timeout, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(scheduler.close, shutdown_timeout)

    # FastAPI's documentation pages would load scripts from other servers.
    app = FastAPI(title="ovis-jax", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(
        AuthAndLimitsMiddleware,  # pyright: ignore[reportArgumentType]
        api_key=api_key,
        max_body_bytes=limits.max_body_bytes,
        body_timeout=limits.request_timeout,
        on_response=metrics.count_response,
    )
    if host is not None:
        app.add_middleware(HostCheckMiddleware, host=host)  # pyright: ignore[reportArgumentType]
    _add_error_handlers(app)

    @app.post("/v1/chat/completions", responses=ERROR_RESPONSES)
    async def chat_completions(body: ChatRequest, request: HttpRequest) -> Response:
        """Answer a conversation."""
        return await service.complete(body, request)

    @app.get("/v1/models", responses={401: ERROR_RESPONSES[401]})
    async def models() -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [service.describe_model()]}

    @app.get("/v1/models/{model:path}", responses={n: ERROR_RESPONSES[n] for n in (401, 404)})
    async def model(model: str) -> dict[str, Any]:
        """Describe a model."""
        service.check_model(model)
        return service.describe_model()

    @app.get("/health", responses={503: {"description": "No more requests are accepted."}})
    async def health() -> Response:
        """Report whether requests are accepted, and the current load."""
        closed = scheduler.failure is not None
        body = {
            "status": "closed" if closed else "ok",
            "max_num_seqs": scheduler.max_num_seqs,
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
        }
        return JSONResponse(body, 503 if closed else 200)

    @app.get("/metrics")
    async def prometheus_metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")

    return app


def _add_error_handlers(app: FastAPI) -> None:
    """Convert exceptions to responses in the API's error format."""

    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: HttpRequest, error: RequestValidationError) -> Response:
        return validation_error(error.errors()).response()

    @app.exception_handler(QueueFullError)
    async def queue_full(request: HttpRequest, error: QueueFullError) -> Response:
        return ApiError(429, str(error), code="queue_full").response()

    @app.exception_handler(EngineClosedError)
    async def engine_closed(request: HttpRequest, error: EngineClosedError) -> Response:
        return _unavailable(error.failure).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: HttpRequest, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):
            error = ApiError(error.status_code, str(error.detail), headers=error.headers)
        return error.response()

    @app.exception_handler(Exception)
    async def unexpected(request: HttpRequest, error: Exception) -> Response:
        return ApiError(500, "internal error; the server's log has the details").response()
