"""The HTTP side: routes of the chat-completions API over an engine."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException

from ovis_jax.inputs.processor import Processor
from ovis_jax.serving.answer import Event, Failed, Job, Piece
from ovis_jax.serving.engine import Closed, Engine, QueueFull
from ovis_jax.serving.gate import Gate, KnownHosts
from ovis_jax.serving.metrics import Metrics
from ovis_jax.serving.prepare import Limits, Preparation
from ovis_jax.serving.refusals import ApiError, ErrorBody, error_body, invalid, retry_headers
from ovis_jax.serving.replies import Reply
from ovis_jax.serving.schema import ChatRequest

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request cannot be answered as it is."},
    401: {"description": "The API key is missing or wrong."},
    404: {"description": "There is no such model."},
    408: {"description": "The body did not arrive in time."},
    413: {"description": "The body is too large."},
    422: {"description": "The body is not as described here."},
    429: {"description": "Too many requests are waiting."},
    503: {"description": "The server stops, its model failed, or the answer took too long."},
}
for _refusal in REFUSALS.values():
    _refusal["model"] = ErrorBody

LAST_WORDS = 10
"""Seconds, behind those of a drain, in which those who were not finished are told so."""


@dataclass(frozen=True)
class Server:
    """What the routes share."""

    engine: Engine
    prepare: Preparation
    name: str
    drain: float
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))

    async def answer(self, body: ChatRequest, request: Request) -> Response:
        """Answer one request, whole or as a stream."""
        self.check_model(body.model)
        self.check_engine()
        if self.engine.full:  # before anything is decoded for nothing
            raise ApiError(429, "too many requests are waiting; try later", code="queue_full")
        arrived = time.monotonic()
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        engine = self.engine
        job = await self.prepare(body, emit)
        try:
            engine.submit(job)
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full") from None
        except Closed:
            self.check_engine()
            raise
        reply = Reply(self.name, job, self.prepare.processor.tokenizer)
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)

            async def gone(message: Any) -> None:
                engine.cancel(job)  # also where the stream has not begun

            return EventSourceResponse(
                self._stream(reply, events, usage, arrived),
                sep="\n",
                client_close_handler_callable=gone,
                shutdown_event=anyio.Event(),
                shutdown_grace_period=self.drain + LAST_WORDS,
            )
        return await self._whole(reply, events, request, arrived)

    async def _whole(
        self, reply: Reply, events: asyncio.Queue[Event], request: Request, arrived: float
    ) -> Response:
        gone = asyncio.create_task(_wait_until_gone(request))
        written = asyncio.create_task(_all_pieces(events, reply.job))
        try:
            await asyncio.wait({gone, written}, return_when=asyncio.FIRST_COMPLETED)
            if not written.done():
                return Response(status_code=499)  # nobody reads it
            return JSONResponse(reply.whole(written.result()))
        finally:
            gone.cancel()
            written.cancel()
            self._end(reply.job, arrived)

    async def _stream(
        self, reply: Reply, events: asyncio.Queue[Event], usage: bool, arrived: float
    ) -> AsyncIterator[dict[str, str]]:
        job = reply.job
        try:
            yield {"data": reply.first(usage)}
            open_choices = job.choices
            while open_choices:
                event = await events.get()
                if isinstance(event, Failed):
                    yield {"data": json.dumps(error_body(503, event.message, None, event.code))}
                    return
                for chunk in reply.piece(event, usage):
                    yield {"data": chunk}
                open_choices -= event.reason is not None
            if usage:
                yield {"data": reply.last()}
            yield {"data": "[DONE]"}
        finally:
            self._end(job, arrived)

    def _end(self, job: Job, arrived: float) -> None:
        self.engine.cancel(job)
        self.metrics.done(job, arrived, time.monotonic())

    def check_engine(self) -> None:
        """Raise `ApiError` where the engine takes no more jobs."""
        if over := self.engine.over:
            raise ApiError(503, over.message, code=over.code)

    def check_model(self, name: str) -> None:
        """Raise `ApiError` for a model that is not served here."""
        if name != self.name:
            message = f"model: there is no {name!r} on this server, only {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def model(self) -> dict[str, Any]:
        """The model as the API lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "ovis-jax",
        }


async def _all_pieces(events: asyncio.Queue[Event], job: Job) -> list[Piece]:
    pieces: list[Piece] = []
    while sum(piece.reason is not None for piece in pieces) < job.choices:
        event = await events.get()
        if isinstance(event, Failed):
            raise ApiError(503, event.message, code=event.code)
        pieces.append(event)
    return pieces


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_app(
    engine: Engine,
    processor: Processor,
    name: str,
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    drain: float = 30.0,
    host: str | None = None,
) -> FastAPI:
    """The application that answers with one model.

    Args:
      engine: what writes; closed when the application shuts down.
      processor: of the same model.
      name: what requests call the model.
      limits: what one request may ask for.
      api_key: what requests below /v1 have to show; None for an open server.
      drain: seconds that streams may go on while the server shuts down.
      host: where the server will listen: on loopback a foreign Host header is refused. None where
        that is not known: nothing is refused.
    """
    limits = limits or Limits()
    prepare = Preparation(processor, limits, engine.max_length, engine.num_slots)
    server = Server(engine, prepare, name, drain, Metrics(engine))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close, drain)

    # Pages of documentation would load scripts of other servers.
    app = FastAPI(title="ovis-jax", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)

    def count(status: int) -> None:
        server.metrics.requests.labels(str(status)).inc()

    app.add_middleware(
        Gate,  # pyright: ignore[reportArgumentType]
        api_key=api_key,
        max_body=limits.max_body,
        seconds=limits.seconds,
        count=count,
    )
    if host is not None:
        app.add_middleware(KnownHosts, host=host)  # pyright: ignore[reportArgumentType]

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError) -> Response:
        return invalid(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        if isinstance(error, ApiError):
            return error.response()
        body = error_body(error.status_code, str(error.detail))
        headers = {**(error.headers or {}), **retry_headers(error.status_code, None)}
        return JSONResponse(body, error.status_code, headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(500, "the server failed; its log says how"), 500)

    @app.post("/v1/chat/completions", responses=REFUSALS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await server.answer(body, request)

    @app.get("/v1/models", responses={401: REFUSALS[401]})
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [server.model()]}

    @app.get("/v1/models/{model:path}", responses={n: REFUSALS[n] for n in (401, 404)})
    async def model(model: str) -> dict[str, Any]:
        """A model by its name."""
        server.check_model(model)
        return server.model()

    @app.get("/health", responses={503: {"description": "No request is taken any more."}})
    async def health() -> Response:
        """Whether requests are taken, and how much is going on."""
        status = "closed" if engine.closed else "ok"
        found = {"status": status, "slots": engine.num_slots}
        found |= {"running": engine.running, "waiting": engine.waiting}
        return JSONResponse(found, 503 if engine.closed else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    return app
