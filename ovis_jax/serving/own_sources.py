"""A page that stands on its own: nothing is loaded from elsewhere, and no route leads there."""

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = "; ".join(
    (
        "default-src 'self'",
        # Gradio's page starts with scripts and styles in its HTML.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
    )
)


class OwnSourcesOnly:
    """Adds a Content-Security-Policy to every response.

    A model's answer can hold anything, a picture on a server that counts visitors too: the browser
    does not ask for it.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its response back with the header."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await self._app(scope, receive, send_with_policy if scope["type"] == "http" else send)


UNUSED = tuple(
    f"/gradio_api/{route}"
    for route in (
        "file=http:",  # fetches from any public server
        "file=https:",
        "proxy=",
        "process_recording",  # gives what a visitor sends to ffmpeg
        "component_server",
        "deep_link",
    )
)


class WithoutUnused:
    """Answers 404 on those of Gradio's routes that reach beyond the page, and that it never asks.

    Visitors would otherwise fetch from other servers through this one, write on its disk, or have
    it run other programs.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, unless it is for one of the routes."""
        if scope["type"] == "http" and scope["path"].lower().startswith(UNUSED):
            await PlainTextResponse("there is no such route on this page", 404)(
                scope, receive, send
            )
        else:
            await self._app(scope, receive, send)
