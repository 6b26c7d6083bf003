"""Shapes of the published models, without their weights."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from ovis_jax import presets
from ovis_jax.checkpoint.key_map import make_hub_key_map, unused_tensor_shapes
from ovis_jax.config import OvisConfig
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model.ovis import Ovis, Params
from ovis_jax.sharding import param_shapes

# Computed by hand from the published configs.
GEMMA2_9B = {
    "vision/patch": 1152 * 3 * 14 * 14,
    "vision/block_26": 4 * (1152 * 1152 + 1152) + 4 * 1152 + 2 * 1152 * 4304 + 4304 + 1152,
    "vision": 412_984_944,
    "visual_tokenizer": 65531 * 4608 + 2 * 65531,
    "visual_embedding": 65536 * 3584,
    "decoder/block_41": 4 * 3584 + 2 * 4096 * 3584 + 2 * 2048 * 3584 + 3 * 14336 * 3584,
    "decoder": 9_241_705_984,
}
GEMMA2_27B = {
    "vision": 412_984_944,
    "visual_tokenizer": 65531 * 4608 + 2 * 65531,
    "visual_embedding": 65536 * 4608,
    "decoder/block_45": 4 * 4608 + 2 * 4096 * 4608 + 2 * 2048 * 4608 + 3 * 36864 * 4608,
    "decoder": 27_227_128_320,
}
PUBLISHED = {
    "9b": (presets.ovis1_6_gemma2_9b(), GEMMA2_9B),
    "27b": (presets.ovis1_6_gemma2_27b(), GEMMA2_27B),
}


@cache
def shapes_of(config: OvisConfig) -> Params:
    return jax.eval_shape(Ovis(config).init, jax.random.key(0))


def count(shapes: Params, path: str = "") -> int:
    flat: dict[str, Any] = flatten_dict(shapes, sep="/")
    return sum(math.prod(leaf.shape) for key, leaf in flat.items() if f"{key}/".startswith(path))


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name: str):
    config, parts = PUBLISHED[name]
    shapes = shapes_of(config)
    assert {part: count(shapes, f"{part}/") for part in parts} == parts


@pytest.mark.slow
def test_9b_has_all_parameters_of_the_published_files():
    config = presets.ovis1_6_gemma2_9b()
    unused = sum(map(math.prod, unused_tensor_shapes(config).values()))
    assert count(shapes_of(config)) + unused == 10_206_910_518
    assert len(make_hub_key_map(config).parameters) + len(make_hub_key_map(config).unused) == 916


TINY = presets.tiny()
TREES = {name: config for name, (config, _) in PUBLISHED.items()} | {
    "tiny": TINY,
    "tiny untied": replace(TINY, decoder=replace(TINY.decoder, tie_embeddings=False)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TREES)
def test_init_returns_the_shapes_of_the_table_of_axes(name: str):
    config = TREES[name]
    flat: dict[str, Any] = flatten_dict(shapes_of(config), sep="/")
    assert {path: leaf.shape for path, leaf in flat.items()} == param_shapes(config)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_init_uses_the_dtype(dtype: jnp.dtype):
    shapes = jax.eval_shape(lambda key: Ovis(presets.tiny()).init(key, dtype), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(dtype)}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_bfloat16_forward(name: str):
    """Shapes and dtypes at the full width, with two blocks of each kind."""
    config, _ = PUBLISHED[name]
    tokenizer, vision = config.visual_tokenizer, replace(config.vision, depth=2)
    config = replace(
        config,
        visual_tokenizer=replace(tokenizer, vision=vision),
        decoder=replace(config.decoder, depth=2),
    )
    model = Ovis(config)
    params = jax.eval_shape(lambda key: model.init(key, jnp.bfloat16), jax.random.key(0))
    tokens: Any = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    pixels: Any = jax.ShapeDtypeStruct((3, 384, 384, 3), jnp.float32)
    inputs = Inputs(tokens, tokens, pixels)
    logits, states = jax.eval_shape(model.forward, params, inputs)
    assert (logits.shape, logits.dtype) == ((2, 512, 256000), jnp.float32)
    images = states.images
    described = {
        "vision": [(state.shape, state.dtype) for state in images.vision],
        "features": (images.tokens.features.shape, images.tokens.features.dtype),
        "probabilities": (images.tokens.probabilities.shape, images.tokens.probabilities.dtype),
        "inputs_embeds": (states.inputs_embeds.shape, states.inputs_embeds.dtype),
        "hidden": [(state.shape, state.dtype) for state in states.hidden],
    }
    D = {"9b": 3584, "27b": 4608}[name]
    assert described == {
        "vision": [((3, 729, 1152), jnp.bfloat16)] * 3,
        "features": ((3, 196, 4608), jnp.bfloat16),
        "probabilities": ((3, 196, 65531), jnp.bfloat16),
        "inputs_embeds": ((2, 512, D), jnp.bfloat16),
        "hidden": [((2, 512, D), jnp.bfloat16)] * 2,
    }
