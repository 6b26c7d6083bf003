"""The model that a benchmark measures, and random inputs of any shape."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import typer

from ovis_jax import Inputs, Ovis, Processor, load, presets
from ovis_jax.config import OvisConfig
from ovis_jax.inputs.image_processing import IMAGE_SLOT
from ovis_jax.model.ovis import Params

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


def random_inputs(config: OvisConfig, batch_size: int, length: int, crops_per_row: int) -> Inputs:
    """Create rows of random text ids and visual slots, with random pixels.

    Args:
      config: config of the model.
      batch_size: number of rows.
      length: positions per row; raised to fit the visual slots.
      crops_per_row: number of crops per row.
    """
    slots = crops_per_row * config.visual_tokenizer.tokens_per_crop
    length = max(length, slots + 2)
    rng = np.random.default_rng(0)
    tokens = rng.integers(108, config.decoder.vocab_size, (batch_size, length)).astype(np.int32)
    tokens[:, 1 : 1 + slots] = IMAGE_SLOT
    positions = np.tile(np.arange(length, dtype=np.int32), (batch_size, 1))
    side = config.vision.image_size
    pixels = rng.normal(size=(batch_size * crops_per_row, side, side, 3)).astype(np.float32)
    return Inputs(tokens, positions, pixels)


def tree_bytes(tree: Any) -> int:
    """Sum the bytes of all arrays or shapes in a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
