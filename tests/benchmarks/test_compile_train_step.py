"""The memory benchmark on eight CPU devices, without libtpu."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from shallow import shallow_config

from benchmarks.compile_train_step import (
    TrainingWorkload,
    abstract_step_arguments,
    measure_step_memory,
    memory_table,
    with_depth,
)
from ovis_jax import presets
from ovis_jax.sharding import param_shapes
from ovis_jax.training.config import StepConfig

SMALL = TrainingWorkload(
    adapters=False, rank=4, rows=1, length=32, crops_per_row=1, micro_batches=2
)
CONFIG = StepConfig(max_steps=1000)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(8, 1), ("data", "model"))


@pytest.mark.slow
def test_full_fine_tuning_of_the_9b(mesh):
    """Weights and two moments in float32, an eighth on each device."""
    config = presets.ovis1_6_gemma2_9b()
    state, frozen, batch = abstract_step_arguments(
        config, CONFIG, mesh, TrainingWorkload(adapters=False)
    )
    size = sum(map(math.prod, param_shapes(config).values()))
    assert sum(x.size for x in state.trainable.values()) == size and not frozen
    local = [math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state)]
    assert 3 * size / 8 < sum(local) < 3 * size / 8 * 1.001
    assert batch.labels.shape == (1, 8, 2048)
    pixels = batch.inputs.pixels
    assert pixels.shape == (1, 32, 384, 384, 3)
    assert pixels.sharding.shard_shape(pixels.shape)[1] == 4


@pytest.mark.slow
def test_adapters_of_the_9b(mesh):
    config = presets.ovis1_6_gemma2_9b()
    state, frozen, _ = abstract_step_arguments(
        config, CONFIG, mesh, TrainingWorkload(adapters=True)
    )
    assert len(state.trainable) == 42 * 4 * 2 and frozen.keys() == param_shapes(config).keys()
    assert all(x.dtype == "bfloat16" for x in frozen.values())
    a = state.trainable["decoder/block_0/attn/q/lora_a"]
    assert a.shape == (16, 3584) and a.sharding.shard_shape(a.shape) == (16, 448)


@pytest.mark.slow
def test_one_part_of_a_shallow_9b(mesh):
    config = with_depth(presets.ovis1_6_gemma2_9b(), 1)
    workload = TrainingWorkload(adapters=False, trainable=("visual_tokenizer",))
    state, frozen, _ = abstract_step_arguments(config, CONFIG, mesh, workload)
    assert state.trainable.keys() | frozen.keys() == param_shapes(config).keys()
    assert {path.partition("/")[0] for path in state.trainable} == {"vision", "visual_tokenizer"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
def test_the_whole_state_is_donated(mesh, adapters):
    workload = dataclasses.replace(SMALL, adapters=adapters)
    result = measure_step_memory(shallow_config(), mesh, workload)
    assert result["state"] <= result["aliased"] < result["arguments"]
    assert result["arguments"] >= result["state"] + result["frozen"]
    assert result["collectives"]["all-gather"]["count"] > 0
    assert (result["frozen"] > 0) is adapters
    assert memory_table([{"name": "full", "fits": True, **result}]).row_count > 9
