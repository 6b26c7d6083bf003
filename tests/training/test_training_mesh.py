"""The same run on one device and on eight gives the same losses."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ovis_jax.inputs.batch import Inputs
from ovis_jax.sharding import FSDP, TENSOR_FSDP
from ovis_jax.training.losses import Batch
from ovis_jax.training.parts import PARTS, split
from ovis_jax.training.step import Recipe, stack, start, step

RECIPE = Recipe(learning_rate=3e-3)
STEPS = 3


@pytest.fixture(scope="module")
def case(shallow):
    """A tiny model, eight rows of one crop each, and their losses and what they teach."""
    model, params = shallow
    rng = np.random.default_rng(0)
    tokens = rng.integers(108, 600, (8, 24)).astype(np.int32)
    tokens[:, 1:10] = -300
    positions = np.tile(np.arange(24, dtype=np.int32), (8, 1))
    pixels = rng.normal(size=(8, 70, 70, 3)).astype(np.float32)
    labels = np.where(np.arange(24) >= 16, tokens, -100).astype(np.int32)
    batch = Batch(Inputs(tokens, positions, pixels), labels)
    return model, params, stack([batch]), *train(model, params, stack([batch]))


def train(model, params, batches):
    """The losses, and the state behind the last."""
    learned, frozen = split(params, list(PARTS))
    state, found = start(RECIPE, learned), []
    for _ in range(STEPS):
        state, metrics = step(model, RECIPE, state, frozen, batches)
        found.append(float(metrics.loss))
    return found, state


@pytest.mark.parametrize("shape, rules", [((8, 1), FSDP), ((4, 2), TENSOR_FSDP)])
def test_eight_devices_change_nothing(case, lay, shape, rules):
    model, params, batches, expected, whole = case
    placed, mesh = lay(params, model.config, shape, rules)
    rows = NamedSharding(mesh, PartitionSpec(None, "data"))
    found, state = train(model, placed, jax.device_put(batches, rows))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert expected[-1] < expected[0]
    for path in ("visual_embedding", "visual_tokenizer/head", "visual_tokenizer/norm/bias"):
        table, true = state.learned[path], whole.learned[path]
        np.testing.assert_allclose(table[: len(true)], true, atol=1e-4)
        assert len(table) == (70 if shape[1] == 2 else len(true))
        # What pads them takes no part, so it learns nothing; not even decay or a moment.
        moments = [x for x in jax.tree.leaves(state.optimizer) if x.shape == table.shape]
        assert len(moments) >= 2
        for x in (table, *moments):
            assert not np.any(np.asarray(x)[len(true) :])
