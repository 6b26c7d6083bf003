"""The memory benchmark on eight CPU devices: its shapes and arithmetic, without libtpu."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from shallow import shallow_config

from benchmarks.train_memory import Case, arguments, measure, table
from ovis_jax import presets
from ovis_jax.sharding import param_shapes
from ovis_jax.training.step import Recipe

TINY = Case(adapters=False, rank=4, rows=1, length=32, crops=1, micro_batches=2)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(8, 1), ("data", "model"))


def test_arguments_of_the_9b(mesh):
    """Master weights and two moments, all float32, an eighth on each device."""
    config = presets.ovis1_6_gemma2_9b()
    state, frozen, data = arguments(config, Recipe(), mesh, Case(adapters=False))
    size = sum(map(math.prod, param_shapes(config).values()))
    assert sum(x.size for x in state.learned.values()) == size and not frozen
    local = [math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state)]
    assert 3 * size / 8 < sum(local) < 3 * size / 8 * 1.001
    assert data.labels.shape == (1, 8, 2048)
    assert data.inputs.pixels.shape == (1, 32, 384, 384, 3)
    assert data.inputs.pixels.sharding.shard_shape(data.inputs.pixels.shape)[1] == 4


def test_adapters_of_the_9b(mesh):
    config = presets.ovis1_6_gemma2_9b()
    state, frozen, _ = arguments(config, Recipe(), mesh, Case(adapters=True))
    assert len(state.learned) == 42 * 4 * 2 and frozen.keys() == param_shapes(config).keys()
    assert all(x.dtype == "bfloat16" for x in frozen.values())
    half = state.learned["decoder/block_0/attn/q/a"]
    assert half.shape == (16, 3584) and half.sharding.shard_shape(half.shape) == (16, 448)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
def test_the_state_is_given_away_whole(mesh, adapters):
    result = measure(shallow_config(), mesh, dataclasses.replace(TINY, adapters=adapters))
    assert result["state"] <= result["aliased"] < result["arguments"]
    assert result["arguments"] >= result["state"] + result["frozen"]
    assert result["collectives"]["all-gather"]["count"] > 0
    assert (result["frozen"] > 0) is adapters
    assert table([{"name": "full", "fits": True, **result}]).row_count > 9
