"""Gradients against PyTorch: the same loss on the same batch, for every parameter."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from measured import record
from reference.ovis_torch import OvisTorch, params_of

from ovis_jax import presets
from ovis_jax.checkpoint.key_map import make_hub_key_map
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model.ovis import Ovis
from ovis_jax.training.losses import cross_entropy_sum_and_count

pytestmark = [pytest.mark.torch, pytest.mark.optimized]

TOLERANCE = 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
def test_gradients(remat):
    """Relative to the largest gradient of the module that a parameter is in.

    (The gradient of SigLIP's key biases is zero but for rounding, since a softmax does not see
    them, so relative to itself it would be noise.)
    """
    config = presets.tiny()
    reference = OvisTorch.random(config, seed=3)
    params, model = params_of(reference, config), Ovis(config, remat=remat)
    rng = np.random.default_rng(0)
    image = [-301, *[-300] * 9, -302, -305]
    row = [2, *image, *rng.integers(108, 600, 12), *image, *rng.integers(108, 600, 9)]
    tokens = np.array([row], np.int32)
    labels = np.where(np.arange(len(row)) >= len(row) - 7, tokens, -100)
    positions = np.arange(len(row), dtype=np.int32)[None]
    pixels = rng.normal(size=(2, 70, 70, 3)).astype(np.float32)

    def loss(params):
        logits, _ = model.forward(params, Inputs(tokens, positions, pixels))
        total, count = cross_entropy_sum_and_count(logits, jax.numpy.asarray(labels))
        return total / count

    value, tree = jax.jit(jax.value_and_grad(loss))(params)
    found = {path: np.asarray(x) for path, x in flatten_dict(tree, sep="/").items()}
    expected_value, by_key = reference.gradients(tokens[0], labels[0], pixels.transpose(0, 3, 1, 2))
    expected = {path: by_key[key] for key, path in make_hub_key_map(config).parameters.items()}
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(value, expected_value, rtol=TOLERANCE)
    largest: dict[str, float] = {}
    for path, gradient in expected.items():
        module = path.rpartition("/")[0]
        largest[module] = max(largest.get(module, 0.0), float(np.abs(gradient).max()))
    for path, gradient in expected.items():
        scale = largest[path.rpartition("/")[0]]
        error = float(np.abs(found[path] - gradient).max()) / scale
        record(path.partition("/")[0], error, TOLERANCE)
        assert scale > 0 and error <= TOLERANCE, f"{path}: {error:.2e} of the largest gradient"
