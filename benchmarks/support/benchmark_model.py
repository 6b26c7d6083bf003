"""The model that a benchmark measures, and its command-line options."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax.traverse_util import flatten_dict, unflatten_dict

from ovis_jax import Ovis, Processor, load, presets
from ovis_jax.checkpoint.params import quantize_matrix
from ovis_jax.config import OvisConfig
from ovis_jax.model.linear import Quantized
from ovis_jax.model.ovis import Params
from ovis_jax.quantization import choose_quantization, quantized_matrices

PRESETS = {
    "tiny": presets.tiny,
    "bench": presets.benchmark,
    "9b": presets.ovis1_6_gemma2_9b,
    "27b": presets.ovis1_6_gemma2_27b,
}
CheckpointOption = Annotated[
    str | None, typer.Option("--model", help="Checkpoint folder, or the bundled ovis-tiny.")
]
PresetOption = Annotated[
    str, typer.Option(help="Config for random weights: " + ", ".join(PRESETS) + ".")
]
BenchmarkDtypeOption = Annotated[
    Literal["float32", "bfloat16"], typer.Option(help="Dtype of weights and activations.")
]


@dataclass(frozen=True)
class BenchmarkModel:
    """A model with its parameters; a model with random weights has no processor."""

    name: str
    model: Ovis
    params: Params
    processor: Processor | None


def load_or_init_model(checkpoint: str | None, preset: str, dtype: str) -> BenchmarkModel:
    """Load a checkpoint if one is given, else initialize random weights of a preset."""
    if checkpoint is not None:
        loaded = load(checkpoint, dtype=dtype)
        return BenchmarkModel(checkpoint, loaded.model, loaded.params, loaded.processor)
    if preset not in PRESETS:
        raise typer.BadParameter(f"preset {preset!r} is unknown; use one of {', '.join(PRESETS)}")
    model = Ovis(PRESETS[preset]())
    params = jax.jit(model.init, static_argnums=1)(jax.random.key(0), jnp.dtype(dtype))
    return BenchmarkModel(preset, model, params, None)


def quantize_params(params: Params, config: OvisConfig, quantization: str) -> Params:
    """Quantize parameters as `load` does."""
    chosen = choose_quantization(config, quantization)
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    for path in quantized_matrices(config, chosen):
        q, scale = quantize_matrix(np.asarray(flat[path]), chosen.group_of(path))
        flat[path] = Quantized(jnp.asarray(q), jnp.asarray(scale))
    return unflatten_dict(flat, sep="/")
