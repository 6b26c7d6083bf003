"""Visual embeddings in bounded memory are those of all crops at once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ovis_jax import Ovis, presets
from ovis_jax.model import ovis


def crops(number: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (number, 70, 70, 3))


@pytest.mark.parametrize("at_once", [1, 5, 12, 27])
def test_parts_change_nothing(shallow, monkeypatch, at_once):
    """Three crops of nine tokens: nine parts, nine again, three, and one."""
    model, params = shallow
    monkeypatch.setattr(ovis, "VISUAL_TOKENS_AT_ONCE", at_once)
    found = jax.jit(model.embed_crops)(params, crops(3))
    expected = model.embed_images(params, crops(3)).embeddings
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_memory_does_not_grow_with_the_crops():
    """What the visual words take is bounded: with 8192 of them it would be most of the memory."""
    tiny = presets.tiny()
    words = replace(tiny.visual_tokenizer, vocab_size=8192)
    model = Ovis(replace(tiny, visual_tokenizer=words))
    params = jax.eval_shape(model.init, jax.random.key(0))

    def temporary(function, number):
        pixels = jax.ShapeDtypeStruct((number, 70, 70, 3), jnp.float32)
        compiled = jax.jit(function).lower(params, pixels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def whole(params, pixels):
        return model.embed_images(params, pixels).embeddings

    distributions = 160 * 9 * 8192 * 4
    assert temporary(whole, 160) > distributions
    assert temporary(model.embed_crops, 160) < 0.7 * distributions


def test_crops_on_many_devices_stay_where_they_are(shallow, monkeypatch):
    model, params = shallow
    monkeypatch.setattr(ovis, "VISUAL_TOKENS_AT_ONCE", 24)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    pixels = jax.device_put(crops(8), NamedSharding(mesh, PartitionSpec("data")))
    compiled = jax.jit(model.embed_crops).lower(params, pixels).compile()
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
    found = compiled(params, pixels)
    np.testing.assert_allclose(found, model.embed_images(params, crops(8)).embeddings, atol=1e-6)
