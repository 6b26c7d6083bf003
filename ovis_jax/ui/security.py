"""Security of the page: only known files, no unused routes, and no content from other servers."""

from collections.abc import Iterator
from typing import Any

from ovis_jax.ui import gradio_isolation  # noqa: F401  must come before Gradio

# isort: split
import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        # Gradio's HTML contains inline scripts and styles.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
    )
)

BLOCKED_ROUTES = tuple(
    f"/gradio_api/{route}"
    for route in (
        "file=http:",  # fetches from any public server
        "file=https:",
        "proxy=",
        "process_recording",  # runs ffmpeg on data that a visitor sends
        "component_server",
        "deep_link",
        "vibe-",
        "undo-vibe-",
    )
)
"""Gradio routes that the page does not need and that fetch URLs, write files or run programs."""


class KnownFilesBlocks(gr.Blocks):
    """Gradio Blocks that only accept the paths of uploaded files and of the page's examples.

    By default, Gradio would also accept and download URLs.

    Attributes:
      example_files: Paths of the example images.
    """

    example_files: frozenset[str] = frozenset()

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> list[Any]:
        """Preprocess the inputs of an event; reject them if they contain an unknown path.

        Raises:
          gr.Error: The inputs contain a path that this server has not sent to a browser.
        """
        for path in _find_paths(inputs):
            # This server created all known paths, so they can be compared without normalization.
            known = isinstance(path, str) and (
                path in self.upload_file_set or path in self.example_files
            )
            if not known:
                raise gr.Error(
                    "This server does not know one of the files; attach it again.",
                    title="Not sent",
                    print_exception=False,
                )
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


class PageSecurityMiddleware:
    """ASGI middleware that adds a Content-Security-Policy header and blocks `BLOCKED_ROUTES`.

    The model's answers may contain anything, such as the URL of a tracking image. With this policy,
    browsers load nothing from other servers. A blocked route receives a 404 response.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application unless its route is blocked, and add the header."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
            await send(message)

        app = self._app
        if scope["type"] == "http" and scope["path"].lower().startswith(BLOCKED_ROUTES):
            app = PlainTextResponse("this page does not have this route", 404)
        await app(scope, receive, send_with_policy)


def _find_paths(data: Any) -> Iterator[Any]:
    """Yield every value with the key "path" in the inputs of an event."""
    if isinstance(data, dict):
        if "path" in data:
            yield data["path"]
        data = list(data.values())
    if isinstance(data, list):
        for item in data:
            yield from _find_paths(item)
