"""The HTTP application, whose routes implement the chat-completions API with the engine."""

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import anyio
from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from ovis_jax.engine.request import EngineError, EventStream, Request
from ovis_jax.engine.scheduler import DEADLINE_EXCEEDED, QueueFullError, Scheduler
from ovis_jax.inputs.conversation import IMAGE_PLACEHOLDER
from ovis_jax.server.errors import (
    ApiError,
    ErrorBody,
    bad_request,
    invalid_json,
    validation_error,
)
from ovis_jax.server.host_check import HostCheckMiddleware
from ovis_jax.server.load_balancing import EngineLoad, choose_engine
from ovis_jax.server.metrics import ServerMetrics
from ovis_jax.server.middleware import AuthAndLimitsMiddleware
from ovis_jax.server.preprocess import Preprocessor, RequestLimits
from ovis_jax.server.request_schema import ChatRequest, PromptOptions, TokenizeRequest
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
        429: "Too many requests are waiting, or the client has too many.",
        503: "The server is busy or shutting down, its model failed, or the request took too long.",
    }.items()
}


MAX_WARNING_LENGTH = 1000
"""Maximum number of characters in the list of ignored fields in a response's header."""


@dataclass(frozen=True)
class ChatService:
    """Answers chat-completions requests.

    Attributes:
      schedulers: The engines. The one that received the last request is the last.
      preprocessor: Converts request bodies to engine requests.
      model_name: Name of the model in requests.
      metrics: Metrics of the server.
    """

    schedulers: list[Scheduler]
    preprocessor: Preprocessor
    model_name: str
    metrics: ServerMetrics

    async def complete(self, body: ChatRequest, http_request: HttpRequest) -> Response:
        """Answer a request, either with a complete response or with a stream."""
        self.check_model(body.model)
        self._accepting()  # check this before images are decoded
        arrival_time, events = time.monotonic(), EventStream()
        request = await self.preprocessor.preprocess(body, events.put)
        scheduler = await self._submit(request)
        tokenizer = self.preprocessor.processor.tokenizer
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        formatter = ResponseFormatter(self.model_name, request, tokenizer, include_usage)
        headers = _warning_header(body)

        def finish() -> None:
            scheduler.abort(request)
            self.metrics.record_request(request, arrival_time, time.monotonic())

        if not request.stream:
            return await self._respond(formatter, events, http_request, finish, headers)

        async def on_close(message: Any) -> None:
            scheduler.abort(request)  # this also works if the stream has not started

        return EventSourceResponse(
            self._stream(formatter, events, finish),
            headers=headers,
            sep="\n",
            client_close_handler_callable=on_close,
            shutdown_event=anyio.Event(),
            shutdown_grace_period=math.inf,  # the engine ends all streams when it is closed
        )

    def _accepting(self) -> list[Scheduler]:
        """Return the engines that accept a request, at least one; raise the error if none does."""
        accepting, errors = [], []
        for scheduler in self.schedulers:
            try:
                scheduler.check_accepting()
                accepting.append(scheduler)
            except (QueueFullError, EngineError) as error:
                errors.append(error)
        if not accepting:  # a full queue is temporary, so it matters more than a failed engine
            raise min(errors, key=lambda error: isinstance(error, EngineError))
        return accepting

    async def _submit(self, request: Request) -> Scheduler:
        """Submit a request to one of the engines, and return this engine."""
        cached = dict.fromkeys(self.schedulers, 0)
        if len(self.schedulers) > 1:  # in a thread, because it may hash many crops
            found = await asyncio.to_thread(lambda: [x.find_prefix(request)[1] for x in cached])
            cached = dict(zip(cached, found, strict=True))
        accepting = self._accepting()
        loads = [EngineLoad(x.num_waiting + x.num_running, cached[x]) for x in accepting]
        chosen = accepting[choose_engine(loads, len(request.tokens), accepting[0].max_num_seqs)]
        chosen.submit(request)
        self.schedulers.remove(chosen)
        self.schedulers.append(chosen)
        return chosen

    async def _respond(
        self,
        formatter: ResponseFormatter,
        events: EventStream,
        http_request: HttpRequest,
        finish: Callable[[], None],
        headers: dict[str, str],
    ) -> Response:
        async def end_on_disconnect() -> None:
            while (await http_request.receive())["type"] != "http.disconnect":
                pass
            events.put(None)

        watcher = asyncio.create_task(end_on_disconnect())
        num_choices = formatter.request.num_choices
        try:
            deltas = [delta async for delta in events.deltas(num_choices)]
            if len(deltas) < num_choices:
                return Response(status_code=499)  # the client has disconnected
            return JSONResponse(formatter.completion(deltas), headers=headers)
        finally:
            watcher.cancel()
            finish()

    async def _stream(
        self, formatter: ResponseFormatter, events: EventStream, finish: Callable[[], None]
    ) -> AsyncIterator[dict[str, str]]:
        try:
            yield {"data": formatter.first_chunk()}
            async for delta in events.deltas(formatter.request.num_choices):
                for chunk in formatter.delta_chunks(delta):
                    yield {"data": chunk}
            for chunk in formatter.last_chunks():
                yield {"data": chunk}
        except EngineError as error:
            yield {"data": json.dumps(_api_error(error).body())}
        finally:
            finish()

    async def tokenize(self, body: TokenizeRequest) -> Response:
        """Count and return the token ids of a conversation or of a text, as vLLM does."""
        if body.model is not None:
            self.check_model(body.model)
        preprocessor, tokenizer = self.preprocessor, self.preprocessor.processor.tokenizer
        if body.messages is not None and body.prompt is None:
            example = await preprocessor.encode_messages(body, body.messages)
            ids = example.tokens.tolist()
        elif body.prompt is not None and body.messages is None:
            ids = await preprocessor.encode_text(body.prompt)
            if body.add_special_tokens is not False:
                ids = [preprocessor.processor.config.bos_id, *ids]
        else:
            raise bad_request("messages", "expected either messages or prompt")
        pieces = None
        if body.return_token_strs:
            pieces = [tokenizer.pieces[i] if i >= 0 else IMAGE_PLACEHOLDER for i in ids]
        content = {
            "count": len(ids),
            "max_model_len": preprocessor.max_model_len,
            "tokens": ids,
            "token_strs": pieces,
        }
        return JSONResponse(content, headers=_warning_header(body))

    def check_model(self, name: str) -> None:
        """Check that `name` is the name of the model; raise an `ApiError` if not."""
        if name != self.model_name:
            message = f"model: this server has no {name!r}, only {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")


def _add_engine(metrics: ServerMetrics, name: str, scheduler: Scheduler) -> None:
    metrics.add_engine(
        name,
        scheduler.max_num_seqs,
        num_running=lambda: scheduler.num_running,
        num_waiting=lambda: scheduler.num_waiting,
        num_visual_bytes=lambda: scheduler.visual_embeddings.num_bytes,
        cache_length=lambda: scheduler.cache_length,
        is_accepting=lambda: scheduler.failure is None,
    )


def _warning_header(body: PromptOptions) -> dict[str, str]:
    """Return a header that lists the fields that were ignored; empty if there are none."""
    # Names come from the client, and a header can contain neither line breaks nor most Unicode.
    names = [
        re.sub(r"[^\w.\[\]-]", "?", name[: MAX_WARNING_LENGTH + 1], flags=re.ASCII)
        for name in body.ignored_fields()
    ]
    if not names:
        return {}
    text = ", ".join(names)
    text = text if len(text) <= MAX_WARNING_LENGTH else f"{text[:MAX_WARNING_LENGTH]}..."
    return {"Warning": f'299 ovis-jax "ignored fields: {text}"'}


def _api_error(error: Exception, content_type: str | None = None) -> ApiError:
    """Convert an exception to an error in the API's format."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return validation_error(error.errors(), content_type)
        case QueueFullError():
            return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
        case EngineError():
            # OpenAI's client must not retry a request that takes too long.
            headers = {"x-should-retry": "false"} if error.failure == DEADLINE_EXCEEDED else None
            _, code, param = error.failure
            return ApiError(
                400 if param else 503, str(error), param=param, code=code, headers=headers
            )
        case HTTPException(status_code=400):
            # FastAPI raises it if parsing the body fails with anything but a JSONDecodeError.
            return invalid_json("it is not UTF-8, is nested too deeply, or has too long a number")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
        case _:
            return ApiError(500, "internal error; the server's log has the details")


async def _error_response(request: HttpRequest, error: Exception) -> Response:
    return _api_error(error, request.headers.get("content-type")).response()


def create_app(
    schedulers: Sequence[Scheduler],
    model_name: str,
    *,
    limits: RequestLimits | None = None,
    api_key: str | None = None,
    host: str | None = None,
    allow_origins: Sequence[str] = (),
) -> FastAPI:
    """Create the application for one model.

    Args:
      schedulers: The engines, which all have the same model and the same limits.
      model_name: Name of the model in requests.
      limits: Limits on each request.
      api_key: API key that clients must send to /tokenize and paths below /v1; None for a server
        without a key.
      host: Address or host name that the server will listen on, for `HostCheckMiddleware`; None to
        disable the check.
      allow_origins: Origins of web pages whose scripts may use the server (CORS); "*" for all.
    """
    limits = limits or RequestLimits()
    processor, max_num_seqs = schedulers[0].processor, schedulers[0].max_num_seqs
    max_model_len = schedulers[0].max_model_len
    preprocessor = Preprocessor(processor, limits, max_model_len, max_choices=max_num_seqs)
    metrics = ServerMetrics()
    for number, scheduler in enumerate(schedulers):
        _add_engine(metrics, str(number), scheduler)
    service = ChatService(list(schedulers), preprocessor, model_name, metrics)
    description: dict[str, Any] = {
        "id": model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "ovis-jax",
        "max_model_len": max_model_len,
    }
    handled = RequestValidationError, QueueFullError, EngineError, HTTPException, Exception
    app = FastAPI(
        title="ovis-jax",
        version="1",
        docs_url=None,  # FastAPI's documentation pages load scripts from other servers
        redoc_url=None,
        exception_handlers=dict.fromkeys(handled, _error_response),
    )
    app.add_middleware(
        AuthAndLimitsMiddleware,
        api_key=api_key,
        max_body_bytes=limits.max_body_bytes,
        max_total_body_bytes=limits.max_total_body_bytes,
        body_timeout=limits.body_timeout,
        max_requests=limits.max_requests,
        max_requests_per_client=limits.max_requests_per_client or limits.max_requests // 2,
        on_response=metrics.count_response,
    )
    if allow_origins:  # around the check of the API key, because a preflight request has none
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "Warning"],
        )
    if host is not None:
        app.add_middleware(HostCheckMiddleware, host=host)

    @app.post("/v1/chat/completions", responses=ERROR_RESPONSES)
    async def chat_completions(body: ChatRequest, request: HttpRequest) -> Response:
        """Answer the last message of a conversation."""
        return await service.complete(body, request)

    @app.post("/tokenize", responses=ERROR_RESPONSES)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Count the tokens of a conversation or of a text."""
        return await service.tokenize(body)

    @app.get("/v1/models", responses={401: ERROR_RESPONSES[401]})
    async def models() -> dict[str, Any]:
        """List the models, which is only one."""
        return {"object": "list", "data": [description]}

    @app.get("/v1/models/{model:path}", responses={n: ERROR_RESPONSES[n] for n in (401, 404)})
    async def model(model: str) -> dict[str, Any]:
        """Return the description of a model."""
        service.check_model(model)
        return description

    @app.get("/health", responses={503: {"description": "No more requests are accepted."}})
    async def health() -> Response:
        """Return whether requests are accepted, and the current load in total and per engine."""
        engines = [
            {
                "status": scheduler.failure.code if scheduler.failure else "ok",
                "max_num_seqs": scheduler.max_num_seqs,
                "running": scheduler.num_running,
                "waiting": scheduler.num_waiting,
            }
            for scheduler in schedulers
        ]
        closed = all(engine["status"] != "ok" for engine in engines)
        body = {
            "status": "closed" if closed else "ok",
            **{
                name: sum(engine[name] for engine in engines)
                for name in ("max_num_seqs", "running", "waiting")
            },
            "engines": engines,
        }
        return JSONResponse(body, 503 if closed else 200)

    @app.get("/metrics")
    async def prometheus_metrics() -> Response:
        """Return the metrics in Prometheus's format."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Return the version of ovis-jax."""
        # Imported by name, because modules of this level may not depend on the whole package.
        return {"version": import_module("ovis_jax").__version__}

    for operations in app.openapi()["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own; the server sends a 400
    return app
