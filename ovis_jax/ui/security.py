"""What the page accepts from browsers: known files only, no unused routes, no foreign content."""

from collections.abc import Iterator
from typing import Any

from ovis_jax.ui import private_dir  # noqa: F401  must come before Gradio

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
    )
)
"""Routes of Gradio that the page does not need and that fetch, write files or start programs."""


class KnownFilesBlocks(gr.Blocks):
    """Gradio Blocks that accept only paths of uploaded files and of the page's own examples.

    Gradio also accepts URLs, which it downloads.

    Attributes:
      example_files: Paths of the examples' images.
    """

    example_files: frozenset[str] = frozenset()

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> list[Any]:
        """Reject the inputs of an event if they hold an unknown path; otherwise preprocess them.

        Raises:
          gr.Error: A path is not one that this server has given to a browser.
        """
        for path in _find_paths(inputs):
            # Known paths were made by this server, so equal strings need no normalization.
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


class ContentSecurityPolicyMiddleware:
    """ASGI middleware that adds a Content-Security-Policy header to every response.

    An answer of the model may contain anything, such as the URL of an image that counts visitors.
    With the policy, browsers load nothing from other servers.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and add the header to its response."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
            await send(message)

        await self._app(scope, receive, send_with_policy if scope["type"] == "http" else send)


class BlockedRoutesMiddleware:
    """ASGI middleware that answers 404 on `BLOCKED_ROUTES`."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, unless its route is blocked."""
        if scope["type"] == "http" and scope["path"].lower().startswith(BLOCKED_ROUTES):
            response = PlainTextResponse("this page does not have this route", 404)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _find_paths(data: Any) -> Iterator[Any]:
    """Yield every value of the key "path" in the inputs of an event."""
    if isinstance(data, dict):
        if "path" in data:
            yield data["path"]
        data = list(data.values())
    if isinstance(data, list):
        for item in data:
            yield from _find_paths(item)
