"""Generation on meshes of 8 CPU devices, placed by the one table of axes."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ovis_jax import presets
from ovis_jax.inference.generate import generate
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model.ovis import Ovis
from ovis_jax.sharding import TENSOR, TENSOR_FSDP, param_shardings


@pytest.fixture(scope="module")
def case():
    """A tiny model whose visual table divides, four rows of one crop each, and their answer."""
    tiny = presets.tiny()
    visual = dataclasses.replace(tiny.visual_tokenizer, vocab_size=72)
    model = Ovis(dataclasses.replace(tiny, visual_tokenizer=visual))
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(108, 600, (4, 40)).astype(np.int32)
    tokens[:, 1:10] = -300
    positions = np.tile(np.arange(40, dtype=np.int32), (4, 1))
    positions[2, 30:] = -1
    inputs = Inputs(tokens, positions, rng.normal(size=(4, 70, 70, 3)).astype(np.float32))
    return model, params, inputs, generate(model, params, inputs, max_new_tokens=12, eos_ids=())


@pytest.mark.parametrize("shape, rules", [((4, 2), TENSOR), ((2, 2), TENSOR_FSDP)])
def test_a_mesh_changes_nothing(case, shape, rules):
    model, params, inputs, expected = case
    devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    mesh = Mesh(devices, ("data", "model"))
    shardings = param_shardings(model.config, mesh, rules)
    flat = flatten_dict(params, sep="/")
    placed = {path: jax.device_put(value, shardings[path]) for path, value in flat.items()}
    rows = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data")))
    out = generate(model, unflatten_dict(placed, sep="/"), rows, max_new_tokens=12, eos_ids=())
    assert out.tokens.tolist() == expected.tokens.tolist()
    np.testing.assert_allclose(out.log_probs, expected.log_probs, atol=1e-4)
