"""Quantized models on a mesh of eight CPU devices give the results of a single device."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ovis_jax import forward, load, quantization
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model import cpu, linear
from ovis_jax.model.linear import Quantized


@pytest.fixture(scope="module")
def inputs():
    """Eight rows with one crop each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(108, 600, (8, 24)).astype(np.int32)
    tokens[:, 1:10] = -300
    positions = np.tile(np.arange(24, dtype=np.int32), (8, 1))
    return Inputs(tokens, positions, rng.normal(size=(8, 70, 70, 3)).astype(np.float32))


@pytest.fixture(scope="module", params=["int8", "int4"])
def one_device(request, shallow_checkpoint, inputs):
    """The format, and the parameters and logits on one device. Groups of 8 fit eight devices.

    The activations are not quantized: another last bit would become another step of their int8.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "_GROUP_SIZES", (8,))
        patch.setattr(cpu, "multiply_by_int8", linear._multiply_by_int8)
        jax.clear_caches()  # other tests have traced products with the original function
        ovis = load(shallow_checkpoint, quantization=request.param)
        logits = np.asarray(forward(ovis.model, ovis.params, inputs))
        yield request.param, flatten_dict(ovis.params, sep="/"), logits
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "rules"), [((4, 2), "tensor"), ((8, 1), "fsdp"), ((4, 2), "tensor_fsdp")]
)
def test_eight_devices_answer_like_one(one_device, shallow_checkpoint, inputs, shape, rules):
    name, params, expected = one_device
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(shape), ("data", "model"))
    ovis = load(shallow_checkpoint, quantization=name, mesh=mesh, rules=rules)
    assert ovis.params["visual_embedding"].shape[0] == (69 if rules == "fsdp" else 70)
    for path, x in flatten_dict(ovis.params, sep="/").items():
        if isinstance(x, Quantized):
            q, scale, rows = np.asarray(x.q), np.asarray(x.scale), params[path].shape[0]
            assert np.array_equal(q[:rows], params[path].q) and not q[rows:].any()
            assert np.array_equal(scale[..., :rows], params[path].scale)
            assert not scale[..., rows:].any()
    block = ovis.params["decoder"]["block_0"]
    for matrix in (block["attn"]["o"], block["mlp"]["up"]):
        parts = {shard.data.size for shard in matrix.q.addressable_shards}
        assert parts == {matrix.q.size // (8 if "fsdp" in rules else 2)}
    rows = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data")))
    logits = np.asarray(forward(ovis.model, ovis.params, rows))
    np.testing.assert_allclose(logits, expected, atol=1e-3)
