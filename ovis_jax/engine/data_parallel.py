"""Data parallelism: several engines, each with its own devices and its own copy of the weights."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from ovis_jax.engine.scheduler import Scheduler, run_engine
from ovis_jax.loading import LoadedOvis


@contextmanager
def run_engines(
    ovis: LoadedOvis, meshes: Sequence[Mesh | None], **options: Any
) -> Iterator[list[Scheduler]]:
    """Run an engine per mesh until the block ends. Their programs are compiled one after the other.

    Args:
      ovis: The model, on the first mesh. Its parameters are copied to the other meshes.
      meshes: Meshes of the same shape and of separate devices. For a single engine, the mesh may be
        None.
      **options: The keyword arguments of `run_engine`.
    """
    with ExitStack() as stack:
        models = [ovis, *(_copy(ovis, mesh) for mesh in meshes[1:] if mesh)]
        yield [stack.enter_context(run_engine(model, **options)) for model in models]


def _copy(ovis: LoadedOvis, mesh: Mesh) -> LoadedOvis:
    def copy(x: Any) -> Any:
        return jax.device_put(x, NamedSharding(mesh, x.sharding.spec))

    return replace(ovis, params=jax.tree.map(copy, ovis.params))
