"""The command `ovis-jax ui`."""

import os
import signal
from typing import Annotated

import jax
import typer
from rich.console import Console

from ovis_jax.compile_cache import DIR_VARIABLE
from ovis_jax.console import (
    AdaptersOption,
    DtypeOption,
    ModelOption,
    TensorParallelOption,
    model_display_name,
)
from ovis_jax.errors import OvisError
from ovis_jax.loading import load
from ovis_jax.mesh import tensor_parallel_mesh

MAX_QUEUED_REQUESTS = 64
PREFILL_CHUNK = 128


def ui(
    model: ModelOption = "ovis-tiny",
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. The page has no password: with 0.0.0.0, anyone who can"
            " reach this machine can use it."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port to listen on; by default the first free one from 7860."
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Maximum number of visitors answered at the same time.")
    ] = 4,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of positions of a prompt and its answer together; by default"
            " the model's longest prompt plus the longest answer of the page, 2048 tokens.",
        ),
    ] = None,
    dtype: DtypeOption = None,
    adapters: AdaptersOption = None,
    tensor_parallel: TensorParallelOption = 1,
) -> None:
    """Chat with a model about images in the browser."""
    try:
        from ovis_jax.engine.runner import ModelRunner
        from ovis_jax.engine.scheduler import Scheduler
        from ovis_jax.ui.page import MAX_TOKENS_CHOICES, create_page, launch_page
        from ovis_jax.ui.private_dir import use_empty_working_dir
    except ModuleNotFoundError as error:
        raise OvisError(
            f"{error}; install the page's dependencies: pip install '.[ui]' in a clone of ovis_jax"
        ) from error
    # As on Ctrl-C, the process must exit in order: this removes the private folder.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    make_compilation_cache_dir_absolute()
    notes = Console(stderr=True, highlight=False)
    mesh = tensor_parallel_mesh(tensor_parallel)
    notes.print(f"loading {model}")
    ovis = load(model, dtype=dtype, adapters=adapters, mesh=mesh)
    max_model_len = max_model_len or ovis.config.multimodal_max_length + max(MAX_TOKENS_CHOICES)
    notes.print(f"compiling for {max_num_seqs} sequences of {max_model_len} positions")
    runner = ModelRunner(
        ovis.model,
        ovis.params,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        chunk_size=PREFILL_CHUNK,
    )
    scheduler = Scheduler(ovis, runner, max_queued_requests=MAX_QUEUED_REQUESTS)
    # After loading, because the user's paths are relative to the original working folder.
    with use_empty_working_dir():
        page = create_page(scheduler, ovis.processor, model_display_name(model))
        url = launch_page(page, host, port)
        notes.print(f"open {url} in a browser; press Ctrl-C to stop", soft_wrap=True)
        page.block_thread()
    scheduler.close(timeout=0.0)


def make_compilation_cache_dir_absolute() -> None:
    """Make a compilation cache from the environment independent of the working folder."""
    folder = os.environ.get(DIR_VARIABLE)
    if folder and "://" not in folder:  # it may also be the URL of a bucket
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(folder))
