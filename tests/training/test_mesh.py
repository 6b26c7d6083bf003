"""Training gives the same losses and parameters on one device and on eight."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ovis_jax.inputs.batch import Inputs
from ovis_jax.sharding import FSDP, TENSOR_FSDP
from ovis_jax.training.config import StepConfig
from ovis_jax.training.losses import TrainBatch
from ovis_jax.training.train_step import init_train_state, stack_micro_batches, train_step
from ovis_jax.training.trainable import TRAINABLE_PARTS, split_params

STEPS = 3
CONFIG = StepConfig(max_steps=STEPS, learning_rate=3e-3)


@pytest.fixture(scope="module")
def one_device(shallow):
    """A shallow model, eight rows of one crop each, and the losses and state on one device."""
    model, params = shallow
    rng = np.random.default_rng(0)
    tokens = rng.integers(108, 600, (8, 24)).astype(np.int32)
    tokens[:, 1:10] = -300
    positions = np.tile(np.arange(24, dtype=np.int32), (8, 1))
    pixels = rng.normal(size=(8, 70, 70, 3)).astype(np.float32)
    labels = np.where(np.arange(24) >= 16, tokens, -100).astype(np.int32)
    batches = stack_micro_batches([TrainBatch(Inputs(tokens, positions, pixels), labels)])
    return model, params, batches, *train(model, params, batches)


def train(model, params, batches):
    trainable, frozen = split_params(params, list(TRAINABLE_PARTS))
    state, losses = init_train_state(CONFIG, trainable), []
    for _ in range(STEPS):
        state, metrics = train_step(model, CONFIG, state, frozen, batches)
        losses.append(float(metrics.loss))
    return losses, state


@pytest.mark.exhaustive
@pytest.mark.parametrize("shape, rules", [((8, 1), FSDP), ((4, 2), TENSOR_FSDP)])
def test_eight_devices_train_like_one(one_device, lay, shape, rules):
    model, params, batches, expected_losses, expected_state = one_device
    placed, mesh = lay(params, model.config, shape, rules)
    rows = NamedSharding(mesh, PartitionSpec(None, "data"))
    losses, state = train(model, placed, jax.device_put(batches, rows))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert expected_losses[-1] < expected_losses[0]
    for path in ("visual_embedding", "visual_tokenizer/head", "visual_tokenizer/norm/bias"):
        table, expected = state.trainable[path], expected_state.trainable[path]
        np.testing.assert_allclose(table[: len(expected)], expected, atol=1e-4)
        assert len(table) == (70 if shape[1] == 2 else len(expected))
        # Padding gets no gradient and no decay, and its moments stay zero.
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == table.shape]
        assert len(moments) >= 2
        for x in (table, *moments):
            assert not np.any(np.asarray(x)[len(expected) :])
