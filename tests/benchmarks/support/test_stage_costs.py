"""The counted FLOPs and bytes, compared with the parameter shapes."""

import math

import pytest

from benchmarks.support.stage_costs import StageCost, decode_cost, prefill_cost, vision_cost
from ovis_jax import presets
from ovis_jax.sharding import param_shapes


def test_every_matrix_counts_once():
    config = presets.benchmark()
    shapes = param_shapes(config)

    def weights(prefix):
        matrices = [s for path, s in shapes.items() if path.startswith(prefix) and len(s) == 2]
        return sum(map(math.prod, matrices))

    cost = decode_cost(config, batch_size=1, length=0, itemsize=2)
    assert cost.bytes == cost.flops == 2 * weights("decoder/")
    vision_weights = weights("vision/block") + math.prod(shapes["vision/patch"])
    assert vision_cost(config, 1, itemsize=4).bytes == 4 * vision_weights
    assert prefill_cost(config, 2, 9, 4).flops == 2 * prefill_cost(config, 1, 9, 4).flops


def test_min_seconds_is_the_slower_of_compute_and_memory():
    cost = StageCost(flops=30.0, bytes=2.0)
    assert cost.min_seconds(bandwidth=1.0, flop_rate=10.0) == pytest.approx(3.0)
    assert cost.min_seconds(bandwidth=0.5, flop_rate=10.0) == pytest.approx(4.0)
