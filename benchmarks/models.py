"""What is measured: a checkpoint or random weights of a preset, and prompts of any shape."""

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import typer

from ovis_jax import Inputs, Ovis, Processor, load, presets
from ovis_jax.config import OvisConfig
from ovis_jax.inputs.image import IMAGE_SLOT
from ovis_jax.model.ovis import Params

PRESETS = {
    "tiny": presets.tiny,
    "bench": presets.bench,
    "9b": presets.ovis1_6_gemma2_9b,
    "27b": presets.ovis1_6_gemma2_27b,
}
Checkpoint = Annotated[str | None, typer.Option("--model", help="A checkpoint, or ovis-tiny.")]
Preset = Annotated[str, typer.Option(help="Random weights: " + ", ".join(PRESETS))]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option()]


@dataclass(frozen=True)
class Measured:
    """A model that is measured; random weights have no processor."""

    name: str
    model: Ovis
    params: Params
    processor: Processor | None


def open_model(checkpoint: str | None, preset: str, dtype: str) -> Measured:
    """The checkpoint if there is one, else random weights of the preset."""
    if checkpoint is not None:
        loaded = load(checkpoint, dtype=dtype)
        return Measured(checkpoint, loaded.model, loaded.params, loaded.processor)
    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r}; there are {', '.join(PRESETS)}")
    model = Ovis(PRESETS[preset]())
    params = jax.jit(model.init, static_argnums=1)(jax.random.key(0), jnp.dtype(dtype))
    return Measured(preset, model, params, None)


def prompts(config: OvisConfig, batch: int, length: int, crops: int) -> Inputs:
    """Random text rows of `length` positions, of which `crops` crops a row are visual slots."""
    slots = crops * config.visual_tokenizer.tokens_per_crop
    length = max(length, slots + 2)
    rng = np.random.default_rng(0)
    tokens = rng.integers(108, config.decoder.vocab_size, (batch, length)).astype(np.int32)
    tokens[:, 1 : 1 + slots] = IMAGE_SLOT
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    side = config.vision.image_size
    pixels = rng.normal(size=(batch * crops, side, side, 3)).astype(np.float32)
    return Inputs(tokens, positions, pixels)
