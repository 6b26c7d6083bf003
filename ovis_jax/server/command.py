"""The command `ovis-jax serve`."""

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Annotated, Any

import typer
from rich.console import Console

from ovis_jax.console import (
    AdaptersOption,
    DtypeOption,
    MaxPartitionOption,
    ModelOption,
    TensorParallelOption,
    model_display_name,
)
from ovis_jax.errors import OvisError
from ovis_jax.inputs.open_image import DEFAULT_MAX_PIXELS
from ovis_jax.loading import load
from ovis_jax.mesh import tensor_parallel_mesh

API_KEY = "OVIS_API_KEY"

UNSUPPORTED_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Errors of an address that this machine does not have, such as one of IPv6."""


def serve(
    model: ModelOption = "ovis-tiny",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free port.")
    ] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="Name of the model in requests; by default the folder's name."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar=API_KEY, help="API key that clients must send.")
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Maximum number of answers generated at the same time.")
    ] = 8,
    max_queued_requests: Annotated[
        int, typer.Option(min=1, help="Maximum number of waiting requests.")
    ] = 64,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of positions of a prompt and its answer together; by default"
            " the model's longest prompt plus --max-tokens.",
        ),
    ] = None,
    prefill_chunk: Annotated[
        int, typer.Option(min=1, help="Number of prompt positions per prefill step.")
    ] = 128,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens per answer.")
    ] = 2048,
    max_images: Annotated[
        int, typer.Option(min=0, help="Maximum number of images per request.")
    ] = 16,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Maximum number of pixels of all images in a request.")
    ] = DEFAULT_MAX_PIXELS,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, help="Maximum number of bytes per request.")
    ] = 32 * 2**20,
    max_partition: MaxPartitionOption = 9,
    request_timeout: Annotated[
        float, typer.Option(min=0.1, help="Maximum time per request, in seconds.")
    ] = 300.0,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            min=0, help="Maximum time for running requests after a signal to stop, in seconds."
        ),
    ] = 30.0,
    allow_remote_images: Annotated[
        bool, typer.Option(help="Fetch images with http(s) URLs from public addresses.")
    ] = False,
    dtype: DtypeOption = None,
    adapters: AdaptersOption = None,
    tensor_parallel: TensorParallelOption = 1,
) -> None:
    """Serve a model through OpenAI's chat-completions API."""
    try:
        import uvicorn

        from ovis_jax.engine.runner import ModelRunner
        from ovis_jax.engine.scheduler import Scheduler
        from ovis_jax.server.app import SHUTDOWN_GRACE, create_app
        from ovis_jax.server.preprocess import RequestLimits
        from ovis_jax.server.shutdown import DrainingServer
    except ModuleNotFoundError as error:
        raise OvisError(
            f"{error}; install the server's dependencies: pip install '.[serve]' in a clone of"
            " ovis_jax"
        ) from error
    notes = Console(stderr=True, highlight=False)
    if api_key == "":
        raise OvisError(f"the API key is empty; set one, or unset {API_KEY} for an open server")
    if host not in ("127.0.0.1", "::1", "localhost") and api_key is None:
        notes.print(f"note: other machines may reach {host}, and no --api-key is set")
    with bind_sockets(host, port) as sockets:  # a taken port is an error before the model loads
        mesh = tensor_parallel_mesh(tensor_parallel)
        ovis = load(model, dtype=dtype, adapters=adapters, mesh=mesh)
        max_model_len = max_model_len or ovis.config.multimodal_max_length + max_tokens
        notes.print(f"compiling for {max_num_seqs} sequences of {max_model_len} positions")
        runner = ModelRunner(
            ovis.model,
            ovis.params,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            chunk_size=prefill_chunk,
        )
        scheduler = Scheduler(ovis, runner, max_queued_requests=max_queued_requests)
        limits = RequestLimits(
            max_body_bytes=max_body_bytes,
            max_images=max_images,
            max_pixels=max_pixels,
            max_tokens=max_tokens,
            request_timeout=request_timeout,
            max_partition=max_partition,
            allow_remote_images=allow_remote_images,
        )
        name = served_model_name or model_display_name(model)
        app = create_app(
            scheduler,
            ovis.processor,
            name,
            limits=limits,
            api_key=api_key,
            shutdown_timeout=shutdown_timeout,
            host=host,
        )
        config = uvicorn.Config(
            app,
            log_level="warning",
            limit_concurrency=4 * (max_num_seqs + max_queued_requests) + 64,
            timeout_graceful_shutdown=SHUTDOWN_GRACE,
        )
        url = http_url(host, sockets[0].getsockname()[1])
        notes.print(f"serving {name!r} at {url}/v1", soft_wrap=True)
        with suppress(KeyboardInterrupt):  # uvicorn raises it again after the shutdown
            DrainingServer(config, scheduler, shutdown_timeout).run(sockets=sockets)


@contextmanager
def bind_sockets(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Bind a port at every address of a host; clients can connect once a server listens.

    Args:
      host: An address or a host name.
      port: The port; 0 for any free port, the same at every address.

    Raises:
      OvisError: The port is taken, or the host is not this machine.
    """
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        unsupported: OSError | None = None
        try:
            for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                try:
                    sockets.append(_bind(info, port, stack))
                except OSError as error:
                    if error.errno not in UNSUPPORTED_ADDRESS:
                        raise
                    unsupported = error
                else:
                    port = sockets[-1].getsockname()[1]
            if unsupported and not sockets:
                raise unsupported
        except OSError as error:
            raise OvisError(
                f"cannot listen on {http_url(host, port)}: {error.strerror}; "
                "set another --port or --host"
            ) from error
        yield sockets


def _bind(info: Any, port: int, stack: ExitStack) -> socket.socket:
    family, type_, protocol, _, (address, _, *more) = info
    bound = stack.enter_context(socket.socket(family, type_, protocol))
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    bound.bind((address, port, *more))
    return bound


def http_url(host: str, port: int) -> str:
    """Return the URL of a server, with brackets around an IPv6 address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
