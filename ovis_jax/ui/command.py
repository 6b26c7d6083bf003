"""The command `ovis-jax ui`."""

import os
from typing import Annotated

import typer
from rich.console import Console

from ovis_jax.console import (
    AdaptersOption,
    DtypeOption,
    KVCacheDtypeOption,
    MaxModelLenOption,
    MaxNumSeqsOption,
    ModelOption,
    QuantizationOption,
    TensorParallelOption,
    interrupt_on_sigterm,
    model_display_name,
)
from ovis_jax.engine.scheduler import run_engine
from ovis_jax.engine.sizes import choose_sizes
from ovis_jax.errors import OvisError, require_extra
from ovis_jax.loading import load
from ovis_jax.mesh import tensor_parallel_mesh
from ovis_jax.server.sockets import LOOPBACK_HOSTS, bind_sockets

AUTH = "OVIS_UI_AUTH"


def ui(
    model: ModelOption = "ovis-tiny",
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. With 0.0.0.0 and without --auth, anyone who can reach this"
            " machine can use the chat page."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="Port to listen on; by default, the first free port from 7860 on.",
        ),
    ] = None,
    auth: Annotated[
        str | None,
        typer.Option(
            envvar=AUTH,
            metavar="USER:PASSWORD",
            help="User name and password that visitors must enter. Other users of this machine can"
            " see the arguments of a command, so prefer the environment variable.",
        ),
    ] = None,
    max_num_seqs: MaxNumSeqsOption = None,
    max_model_len: MaxModelLenOption = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    kv_cache_dtype: KVCacheDtypeOption = "auto",
    adapters: AdaptersOption = None,
    tensor_parallel: TensorParallelOption = 1,
) -> None:
    """Chat with a model about images in the browser."""
    with require_extra("ui"):
        from ovis_jax.ui.gradio_isolation import use_empty_working_dir
        from ovis_jax.ui.page import create_page, launch_page_in_thread
    credentials = _parse_auth(auth)
    with bind_sockets(host.strip("[]"), port or 0):
        pass  # checks the port before the model is loaded; Gradio binds it again later
    notes = Console(stderr=True, highlight=False)
    if host not in LOOPBACK_HOSTS and credentials is None:
        notes.print(f"note: other machines may reach {host}, and no --auth is set")
    notes.print(f"loading {model}")
    mesh = tensor_parallel_mesh(tensor_parallel)
    ovis = load(
        model,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        adapters=adapters,
        mesh=mesh,
    )
    max_num_seqs, max_model_len = choose_sizes(ovis, max_num_seqs, max_model_len)
    notes.print(f"compiling for {max_num_seqs} sequences of {max_model_len} positions")
    with (
        interrupt_on_sigterm(),  # so that the private folder is removed
        run_engine(
            ovis,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            supports_constraints=False,
        ) as scheduler,
        # This comes after loading, because the user's paths are relative to the original working
        # folder.
        use_empty_working_dir(),
    ):
        page = create_page(scheduler, model_display_name(model))
        url = launch_page_in_thread(page, host, port, credentials)
        notes.print(f"open {url} in a browser; press Ctrl-C to stop", soft_wrap=True)
        page.block_thread()


def _parse_auth(auth: str | None) -> tuple[str, str] | None:
    """Return the user name and the password; an error message contains neither of them."""
    auth = os.environ.get(AUTH) if auth is None else auth  # typer ignores a variable that is empty
    if auth is None:
        return None
    user, _, password = auth.partition(":")
    if not (user.strip() and password):
        raise OvisError(
            f"--auth or {AUTH}: expected USER:PASSWORD, a user name, a colon and a password"
        )
    return user.strip(), password  # Gradio removes spaces around the name that a visitor enters
