"""One call from a checkpoint to everything that an answer needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ovis_jax.checkpoint.adapters import load_adapters
from ovis_jax.checkpoint.params import OnRead, load_params
from ovis_jax.checkpoint.source import find_source
from ovis_jax.config import OvisConfig
from ovis_jax.inputs.processor import Processor
from ovis_jax.mesh_axes import automatic
from ovis_jax.model.ovis import Ovis, Params
from ovis_jax.sharding import TENSOR, Rules
from ovis_jax.training.parts import Flat, join


@dataclass(frozen=True)
class LoadedOvis:
    """A model with its parameters and its processor."""

    config: OvisConfig
    model: Ovis
    params: Params
    processor: Processor


def load(
    path: str | Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: Rules = TENSOR,
    adapters: str | Path | None = None,
    on_read: OnRead | None = None,
) -> LoadedOvis:
    """Load a checkpoint.

    Args:
      path: a converted folder, a folder in the layout of the Hub, a repo id, which is fetched, or
        "ovis-tiny", the small checkpoint that comes with the library.
      dtype: of parameters and activations (float32, bfloat16 or float16); None for that of the
        checkpoint.
      mesh: where the parameters are to lie, each device reading only its own slice; None for the
        default device. Of several processes each reads only what its devices hold.
      rules: which axes of the mesh cut which letters: `TENSOR`, `FSDP`, `TENSOR_FSDP` or a table of
        your own from letters to "data", "model" or other axes of the mesh.
      adapters: a folder of low-rank adapters made by `save_adapters`; the matrices that they are of
        become `LowRank` in the parameters.
      on_read: called with the key and the bytes of each slice of a tensor that this process reads.

    Raises:
      ConfigError: a config or tokenizer file is missing or asks for what is not supported.
      CheckpointError: the weights or the adapters are not those of the config; names every fault.
      OvisError: there is no such folder, repo or folder of adapters, or the parameters cannot be
        laid on the mesh.
      OSError: the Hub cannot be reached, or a file cannot be read.
    """
    mesh = mesh and automatic(mesh)
    folder = find_source(path).folder
    config = OvisConfig.from_folder(folder)
    processor = Processor.from_folder(folder, config)
    # Before the weights: they are small, and may be those of another model.
    added = None if adapters is None else load_adapters(adapters, config, mesh=mesh, rules=rules)
    params = load_params(folder, config, dtype=dtype, mesh=mesh, rules=rules, on_read=on_read)
    if added is not None:
        flat = cast(Flat, flatten_dict(params, sep="/"))
        matrix = {path: flat[path.rpartition("/")[0]] for path in added.halves}
        halves = {path: x.astype(matrix[path].dtype) for path, x in added.halves.items()}
        params = join(halves, flat, added.scale)
    return LoadedOvis(config, Ovis(config), params, processor)
