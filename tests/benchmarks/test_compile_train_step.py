"""The memory benchmark on eight CPU devices, without libtpu."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from shallow import shallow_config

from benchmarks.compile_train_step import make_recipe, measure_step_memory, memory_table
from ovis_jax.plan.topologies import MeshSizes, parse_topology
from ovis_jax.training.training_workload import TrainingWorkload


@pytest.mark.exhaustive
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
def test_the_whole_state_is_donated(adapters):
    mesh = Mesh(np.array(jax.devices()).reshape(8, 1), ("data", "model"))
    recipe = make_recipe(MeshSizes(8, 1), adapters=adapters, rank=4, length=32)
    workload = TrainingWorkload(shallow_config(), recipe, parse_topology("v5e:2x4"))
    result = measure_step_memory(workload, mesh)
    assert result["state"] <= result["aliased"] < result["arguments"]
    assert result["arguments"] >= result["state"] + result["frozen"]
    assert result["collectives"]["all-gather"]["count"] > 0
    assert (result["frozen"] > 0) is adapters
    assert memory_table([{"name": "full", "fits": True, **result}]).row_count > 9
