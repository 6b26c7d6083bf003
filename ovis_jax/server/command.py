"""The command `ovis-jax serve`."""

import re
from contextlib import suppress
from typing import Annotated

import typer
from rich.console import Console

from ovis_jax.console import (
    AdaptersOption,
    DtypeOption,
    KVCacheDtypeOption,
    MaxModelLenOption,
    MaxNewTokensOption,
    MaxNumSeqsOption,
    MaxPartitionOption,
    ModelOption,
    QuantizationOption,
    TensorParallelOption,
    model_display_name,
)
from ovis_jax.engine.data_parallel import run_engines
from ovis_jax.engine.sizes import choose_sizes
from ovis_jax.errors import OvisError, require_extra
from ovis_jax.inputs.open_image import DEFAULT_MAX_IMAGE_PIXELS, DEFAULT_MAX_PIXELS
from ovis_jax.loading import load
from ovis_jax.mesh import data_parallel_meshes
from ovis_jax.server.sockets import LOOPBACK_HOSTS, bind_sockets, http_url

API_KEY = "OVIS_API_KEY"

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s*@A-Z]+")
"""Pattern for the origin of a web page, which browsers send in lower case."""

SHUTDOWN_GRACE = 10
"""Time after the shutdown timeout for sending a 503 to unfinished requests, in seconds."""


def serve(
    model: ModelOption = "ovis-tiny",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses any free port.")
    ] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="Name of the model in requests; by default, the name of its folder."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar=API_KEY, help="API key that clients must send.")
    ] = None,
    max_num_seqs: MaxNumSeqsOption = None,
    max_queued_requests: Annotated[
        int, typer.Option(min=1, help="Maximum number of waiting requests.")
    ] = 64,
    max_model_len: MaxModelLenOption = None,
    prefill_chunk: Annotated[
        int, typer.Option(min=1, help="Number of prompt positions per prefill step.")
    ] = 128,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of prompt positions processed between two decode steps. By"
            " default, the number that can be processed in the time of two decode steps.",
        ),
    ] = None,
    max_num_partial_prefills: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum number of prompts that are processed at a time. If it is more than 1,"
            " an answer may depend on other requests, because rounding differs.",
        ),
    ] = 1,
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Reuse the KV cache and the images of earlier requests.")
    ] = True,
    max_new_tokens: MaxNewTokensOption = 2048,
    max_images: Annotated[
        int, typer.Option(min=0, help="Maximum number of images per request.")
    ] = 16,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Maximum number of pixels in all images of a request.")
    ] = DEFAULT_MAX_PIXELS,
    max_image_pixels: Annotated[
        int, typer.Option(min=1, help="Maximum number of pixels in one image.")
    ] = DEFAULT_MAX_IMAGE_PIXELS,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, help="Maximum size of a request body, in bytes.")
    ] = 32 * 2**20,
    max_total_body_bytes: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum size of the bodies of all open requests, in bytes. One client may use"
            " half of it.",
        ),
    ] = 2**30,
    max_requests_per_client: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of open requests from one address. By default, half of the"
            " maximum for all clients together, which is 4 x (--max-num-seqs +"
            " --max-queued-requests) per engine, plus 64.",
        ),
    ] = None,
    body_timeout: Annotated[
        float, typer.Option(min=0.1, help="Maximum time for a request body to arrive, in seconds.")
    ] = 60.0,
    max_partition: MaxPartitionOption = 9,
    request_timeout: Annotated[
        float, typer.Option(min=0.1, help="Maximum time per request, in seconds.")
    ] = 300.0,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            min=0,
            help="Maximum time, in seconds, for open requests to finish after a stop signal.",
        ),
    ] = 30.0,
    allow_remote_images: Annotated[
        bool, typer.Option(help="Fetch images from http(s) URLs with public addresses.")
    ] = False,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin of web pages whose scripts may use the server, such as"
            " http://localhost:3000, or * for all; may be repeated."
        ),
    ] = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    kv_cache_dtype: KVCacheDtypeOption = "auto",
    adapters: AdaptersOption = None,
    tensor_parallel: TensorParallelOption = 1,
    data_parallel: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of engines. Each has its own copy of the model, on --tensor-parallel"
            " devices, and its own --max-num-seqs and --max-queued-requests.",
        ),
    ] = 1,
) -> None:
    """Serve a model through OpenAI's chat-completions API."""
    with require_extra("serve"):
        import uvicorn

        from ovis_jax.server.app import create_app
        from ovis_jax.server.connections import SPARE_CONNECTIONS, TimedProtocol
        from ovis_jax.server.preprocess import RequestLimits, default_max_requests
        from ovis_jax.server.shutdown import DrainingServer
    notes = Console(stderr=True, highlight=False)
    if api_key == "":
        raise OvisError(f"the API key is empty; set one, or unset {API_KEY} for an open server")
    if host not in LOOPBACK_HOSTS and api_key is None:
        notes.print(f"note: other machines may reach {host}, and no --api-key is set")
    for origin in allow_origin or []:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise OvisError(
                f"--allow-origin: {origin!r} is not an origin; expected *, or a scheme, a host and"
                " optionally a port, in lower case and without a path, such as"
                " http://localhost:3000"
            )
    with bind_sockets(host, port) as sockets:
        meshes = data_parallel_meshes(data_parallel, tensor_parallel)
        ovis = load(
            model,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            adapters=adapters,
            mesh=meshes[0],
        )
        max_num_seqs, max_model_len = choose_sizes(ovis, max_num_seqs, max_model_len)
        limits = RequestLimits(
            max_body_bytes=max_body_bytes,
            max_total_body_bytes=max_total_body_bytes,
            max_requests=default_max_requests(max_num_seqs, max_queued_requests, data_parallel),
            max_requests_per_client=max_requests_per_client,
            body_timeout=body_timeout,
            max_images=max_images,
            max_pixels=max_pixels,
            max_image_pixels=max_image_pixels,
            max_tokens=max_new_tokens,
            request_timeout=request_timeout,
            max_partition=max_partition,
            allow_remote_images=allow_remote_images,
        )
        engines = "" if data_parallel == 1 else f" in each of {data_parallel} engines"
        notes.print(f"compiling for {max_num_seqs} sequences of {max_model_len} positions{engines}")
        with run_engines(
            ovis,
            meshes,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            chunk_size=prefill_chunk,
            max_queued_requests=max_queued_requests,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_partial_prefills=max_num_partial_prefills,
            enable_prefix_caching=enable_prefix_caching,
        ) as schedulers:
            name = served_model_name or model_display_name(model)
            config = uvicorn.Config(
                create_app(
                    schedulers,
                    name,
                    limits=limits,
                    api_key=api_key,
                    host=host,
                    allow_origins=allow_origin or [],
                ),
                log_level="warning",
                http=TimedProtocol,
                ws="none",
                limit_concurrency=limits.max_requests + SPARE_CONNECTIONS,
                timeout_graceful_shutdown=SHUTDOWN_GRACE,
            )
            for bound in sockets:
                bound.listen()  # from now on, clients can connect
            url = http_url(host, sockets[0].getsockname()[1])
            notes.print(f"serving {name!r} at {url}/v1", soft_wrap=True)
            with suppress(KeyboardInterrupt):  # uvicorn raises it again after the shutdown
                DrainingServer(config, schedulers, shutdown_timeout).run(sockets=sockets)
