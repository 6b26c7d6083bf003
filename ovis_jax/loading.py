"""One call from a checkpoint to everything that an answer needs."""

from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh
from jax.typing import DTypeLike

from ovis_jax.checkpoint.params import load_params
from ovis_jax.checkpoint.source import find_source
from ovis_jax.config import OvisConfig
from ovis_jax.inputs.processor import Processor
from ovis_jax.model.ovis import Ovis, Params


@dataclass(frozen=True)
class LoadedOvis:
    """A model with its parameters and its processor."""

    config: OvisConfig
    model: Ovis
    params: Params
    processor: Processor


def load(
    path: str | Path, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> LoadedOvis:
    """Load a checkpoint.

    Args:
      path: a converted folder, a folder in the layout of the Hub, or a repo id, which is fetched.
      dtype: of parameters and activations (float32, bfloat16 or float16); None for that of the
        checkpoint.
      mesh: where the parameters are to lie, each device reading only its own slice; None for the
        default device.

    Raises:
      ConfigError: a config or tokenizer file is missing or asks for what is not supported.
      CheckpointError: the weights are not those of the config; names every fault.
      OvisError: there is no such folder or repo, or the parameters cannot be laid on the mesh.
      OSError: the Hub cannot be reached, or a file cannot be read.
    """
    folder = find_source(path).folder
    config = OvisConfig.from_folder(folder)
    processor = Processor.from_folder(folder, config)
    params = load_params(folder, config, dtype=dtype, mesh=mesh)
    return LoadedOvis(config, Ovis(config), params, processor)
