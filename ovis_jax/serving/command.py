"""The command `ovis-jax serve`."""

from contextlib import suppress
from typing import Annotated

import typer
from rich.console import Console

from ovis_jax import mesh_axes
from ovis_jax.console import (
    Adapters,
    MaxPartition,
    Model,
    OtherDtype,
    TensorParallel,
    model_name,
)
from ovis_jax.errors import OvisError
from ovis_jax.loading import load
from ovis_jax.serving.decoding import MAX_PIXELS

API_KEY = "OVIS_API_KEY"


def serve(
    model: Model = "ovis-tiny",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What requests call the model.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar=API_KEY, help="What requests have to show.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Answers written at once.")] = 8,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 64,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Positions of prompt and answer together.")
    ] = None,
    piece: Annotated[int, typer.Option(min=1, help="Prompt positions read at a time.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 2048,
    max_images: Annotated[int, typer.Option(min=0, help="Images of a request.")] = 16,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Pixels of a request's images together.")
    ] = MAX_PIXELS,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 32 * 2**20,
    max_partition: MaxPartition = 9,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time of a request.")] = 300.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that a shut-down waits.")] = 30.0,
    allow_remote_images: Annotated[
        bool, typer.Option(help="Fetch http(s) images from public addresses.")
    ] = False,
    dtype: OtherDtype = None,
    adapters: Adapters = None,
    tensor_parallel: TensorParallel = 1,
) -> None:
    """Serve a model to programs that speak OpenAI's chat-completions API."""
    try:
        import uvicorn

        from ovis_jax.serving.app import LAST_WORDS, make_app
        from ovis_jax.serving.engine import Engine
        from ovis_jax.serving.listening import DrainingServer, bound, port_of, url
        from ovis_jax.serving.prepare import Limits
        from ovis_jax.serving.steps import Steps
    except ModuleNotFoundError as error:
        raise OvisError(f"{error}; serving needs: pip install 'ovis-jax[serve]'") from error
    notes = Console(stderr=True, highlight=False)
    if api_key == "":
        raise OvisError(f"the API key is empty; give one, or unset {API_KEY} for an open server")
    if host not in ("127.0.0.1", "::1", "localhost") and api_key is None:
        notes.print(f"note: {host} may be reached by others, and no --api-key is set")
    with bound(host, port) as listeners:  # a port that is taken is told of before the long part
        mesh = mesh_axes.tensor_parallel(tensor_parallel)
        ovis = load(model, dtype=dtype, adapters=adapters, mesh=mesh)
        # A prompt as long as the model reads, and room for an answer behind it.
        length = max_length or ovis.config.multimodal_max_length + max_tokens
        notes.print(f"compiling for {slots} slots of {length} positions")
        steps = Steps(ovis.model, ovis.params, num_slots=slots, max_length=length, piece=piece)
        engine = Engine(ovis, steps, queue=queue)
        limits = Limits(
            max_body=max_body,
            max_images=max_images,
            max_pixels=max_pixels,
            max_tokens=max_tokens,
            seconds=seconds,
            max_partition=max_partition,
            remote_images=allow_remote_images,
        )
        title = name or model_name(model)
        app = make_app(
            engine,
            ovis.processor,
            title,
            limits=limits,
            api_key=api_key,
            drain=drain,
            host=host,
        )
        config = uvicorn.Config(
            app,
            log_level="warning",
            limit_concurrency=4 * (slots + queue) + 64,
            timeout_graceful_shutdown=LAST_WORDS,
        )
        notes.print(f"serving {title!r} at {url(host, port_of(listeners[0]))}/v1", soft_wrap=True)
        with suppress(KeyboardInterrupt):  # uvicorn raises it again behind the shut-down
            DrainingServer(config, engine, drain).run(sockets=listeners)
