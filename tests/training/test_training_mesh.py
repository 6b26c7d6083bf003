"""The same run on one device and on eight gives the same losses."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ovis_jax import presets
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model.ovis import Ovis
from ovis_jax.sharding import FSDP, TENSOR_FSDP, param_shardings
from ovis_jax.training.losses import Batch
from ovis_jax.training.parts import PARTS, split
from ovis_jax.training.step import Recipe, stack, start, step

RECIPE = Recipe(learning_rate=3e-3)
STEPS = 3


@pytest.fixture(scope="module")
def case():
    """A tiny model whose visual table divides, eight rows of one crop each, and their losses."""
    tiny = presets.tiny()
    visual = dataclasses.replace(tiny.visual_tokenizer, vocab_size=72)
    model = Ovis(dataclasses.replace(tiny, visual_tokenizer=visual))
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(108, 600, (8, 24)).astype(np.int32)
    tokens[:, 1:10] = -300
    positions = np.tile(np.arange(24, dtype=np.int32), (8, 1))
    pixels = rng.normal(size=(8, 70, 70, 3)).astype(np.float32)
    labels = np.where(np.arange(24) >= 16, tokens, -100).astype(np.int32)
    batch = Batch(Inputs(tokens, positions, pixels), labels)
    return model, params, stack([batch]), losses(model, params, stack([batch]))


def losses(model, params, batches) -> list[float]:
    learned, frozen = split(params, list(PARTS))
    state, found = start(RECIPE, learned), []
    for _ in range(STEPS):
        state, metrics = step(model, RECIPE, state, frozen, batches)
        found.append(float(metrics.loss))
    return found


@pytest.mark.parametrize("shape, rules", [((8, 1), FSDP), ((4, 2), TENSOR_FSDP)])
def test_eight_devices_change_nothing(case, shape, rules):
    model, params, batches, expected = case
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "model"))
    shardings = param_shardings(model.config, mesh, rules)
    flat = flatten_dict(params, sep="/")
    placed = {path: jax.device_put(value, shardings[path]) for path, value in flat.items()}
    rows = NamedSharding(mesh, PartitionSpec(None, "data"))
    found = losses(model, unflatten_dict(placed, sep="/"), jax.device_put(batches, rows))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert expected[-1] < expected[0]
