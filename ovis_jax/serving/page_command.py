"""The command `ovis-jax ui`."""

from typing import Annotated

import typer
from rich.console import Console

from ovis_jax import mesh_axes
from ovis_jax.console import Adapters, Model, OtherDtype, TensorParallel, model_name
from ovis_jax.errors import OvisError
from ovis_jax.loading import load


def ui(
    model: Model = "ovis-tiny",
    host: Annotated[
        str, typer.Option(help="Where to listen; 0.0.0.0 lets other machines in, unasked.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="The port; without it the first free one from 7860 on.")
    ] = None,
    dtype: OtherDtype = None,
    adapters: Adapters = None,
    tensor_parallel: TensorParallel = 1,
) -> None:
    """Talk with a model about pictures in the browser."""
    try:
        from ovis_jax.serving import page
    except ModuleNotFoundError as error:
        raise OvisError(f"{error}; the page needs: pip install 'ovis-jax[ui]'") from error
    mesh = mesh_axes.tensor_parallel(tensor_parallel)
    notes = Console(stderr=True, highlight=False)
    notes.print(f"loading {model} ...")
    ovis = load(model, dtype=dtype, adapters=adapters, mesh=mesh)
    with page.apart():  # behind the loading: paths of the user's are relative to where it began
        blocks = page.build(ovis, model_name(model))
        address = page.launch(blocks, host, port)
        notes.print(f"open {address} in a browser; Ctrl-C ends", soft_wrap=True)
        blocks.block_thread()
