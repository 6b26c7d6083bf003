"""Copies of a model for several engines."""

import jax
import numpy as np
import pytest
from compilations import compilations
from flax.traverse_util import flatten_dict
from random_adapters import random_adapters
from serving_setup import SIZES

from ovis_jax import load
from ovis_jax.checkpoint.adapters import save_adapters
from ovis_jax.engine import data_parallel
from ovis_jax.engine.data_parallel import run_engines
from ovis_jax.errors import OvisError
from ovis_jax.mesh import data_parallel_meshes


def test_meshes_of_separate_devices():
    devices = jax.devices()
    assert data_parallel_meshes(1, 1) == [None]
    (mesh,) = data_parallel_meshes(1, 8)
    assert mesh is not None and mesh.devices.ravel().tolist() == devices
    meshes = data_parallel_meshes(4, 2)
    found = [mesh.devices.ravel().tolist() for mesh in meshes if mesh]
    assert found == [devices[n : n + 2] for n in (0, 2, 4, 6)]
    with pytest.raises(OvisError, match="data 3 x model 4 needs 12 devices, and JAX has 8"):
        data_parallel_meshes(3, 4)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_copies_of_the_parameters(monkeypatch, tmp_path, shallow_checkpoint, quantization):
    """Every engine has the same parameters, sharded alike over its own devices."""
    models = []
    monkeypatch.setattr(
        data_parallel, "run_engine", lambda model, **options: models.append(model) or options
    )
    monkeypatch.setattr(data_parallel.ExitStack, "enter_context", lambda stack, options: options)
    meshes = data_parallel_meshes(2, 2)
    config = load(shallow_checkpoint).config
    save_adapters(tmp_path / "adapters", random_adapters(config), config, scale=0.5)
    ovis = load(
        shallow_checkpoint,
        mesh=meshes[0],
        quantization=quantization,
        adapters=tmp_path / "adapters",
    )
    with run_engines(ovis, meshes, max_num_seqs=3) as engines:
        assert engines == [{"max_num_seqs": 3}] * 2
    first, second = (flatten_dict(model.params, sep="/") for model in models)
    for path, x in first.items():
        for old, new in zip(jax.tree.leaves(x), jax.tree.leaves(second[path]), strict=True):
            assert new.devices() == set(jax.devices()[2:4]), path
            assert new.sharding.spec == old.sharding.spec
            np.testing.assert_array_equal(new, old)


@pytest.mark.exhaustive
def test_engines_on_separate_devices_give_the_same_answers(scheduler, submit, scenes):
    asked = [(list(turns), images) for turns, images, _ in scenes[:8]]
    meshes = data_parallel_meshes(2, 2)
    with run_engines(load("ovis-tiny", mesh=meshes[0]), meshes, **SIZES) as engines:
        for number, engine in enumerate(engines):
            keys, _ = engine._state.cache.blocks[0]
            assert keys.devices() == set(jax.devices()[2 * number : 2 * number + 2])
        with compilations() as found:
            submitted = [[submit(engine, *pair) for engine in engines] for pair in asked]
            texts = [[one.text() for one in pair] for pair in submitted]
    assert found == []
    assert texts == [[submit(scheduler, *pair).text()] * 2 for pair in asked]
