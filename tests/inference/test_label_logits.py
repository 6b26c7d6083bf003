"""Chunks of logits at labels against the logits at all positions."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ovis_jax.inference import label_logits
from ovis_jax.inference.label_logits import label_log_probs, map_label_logits
from ovis_jax.model.decoder import unembed
from ovis_jax.model.linear import LowRank, Quantized
from ovis_jax.quantization import quantize_rows
from ovis_jax.sharding import FSDP, TENSOR_FSDP

B, T = 2, 11
LABELS = np.full((B, T), -100, np.int32)
LABELS[0, [2, 9]] = 7, 599
LABELS[1, [1, 3, 4, 5, 8]] = 0, 3, 300, 5, 8


@pytest.fixture(scope="module")
def hidden(shallow):
    D = shallow[0].config.decoder.width
    return jnp.array(np.random.default_rng(0).normal(size=(B, T, D)) * 3, jnp.float32)


@pytest.fixture
def set_chunk(monkeypatch, shallow):
    """Set the number of positions per row and chunk."""

    def set_chunk(positions: int, rows: int = B) -> None:
        logits = positions * rows * shallow[0].config.decoder.vocab_size
        monkeypatch.setattr(label_logits, "LOGITS_PER_CHUNK", logits)

    return set_chunk


def weighted_sum(model, labels, params, hidden):
    found = map_label_logits(label_log_probs, model, params, hidden, jnp.array(labels))
    weights = np.random.default_rng(1).normal(size=found.shape).astype(np.float32)
    return jnp.sum(found * weights), found


def value_and_gradients(model, labels, params, hidden):
    function = partial(weighted_sum, model, labels)
    (_, found), gradients = jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))(
        params, hidden
    )
    return found, gradients


def assert_close(found, expected, tolerance: float = 1e-5) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max()


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("positions", [1, 2, 5, 6])
def test_values_and_gradients(shallow, hidden, set_chunk, positions):
    """T is 11; the two rows have two and five labels."""
    model, params = shallow
    expected = value_and_gradients(model, LABELS, params, hidden)
    log_probs = jax.nn.log_softmax(
        unembed(model.config.decoder, hidden, *model.unembed_weights(params))
    )
    at_labels = jnp.take_along_axis(log_probs, jnp.maximum(LABELS, 0)[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(expected[0], np.where(LABELS >= 0, at_labels, 0), atol=1e-5)
    set_chunk(positions)
    assert_close(value_and_gradients(model, LABELS, params, hidden), expected)


@pytest.mark.parametrize("labels", [np.full((B, T), -100), np.full((B, T), 5)], ids=["none", "all"])
def test_no_labels_and_only_labels(shallow, hidden, set_chunk, labels):
    model, params = shallow
    labels = labels.astype(np.int32)
    expected = value_and_gradients(model, labels, params, hidden)
    set_chunk(2)
    assert_close(value_and_gradients(model, labels, params, hidden), expected)


def test_chunks_without_labels_are_skipped(shallow, hidden, set_chunk):
    """The two rows need three chunks of two positions; positions in other chunks are not read."""
    model, params = shallow
    is_read = np.arange(T) < 6
    labels = np.where(is_read, 5, -100).astype(np.int32)[None].repeat(B, axis=0)
    set_chunk(2)
    broken = jnp.where(is_read[None, :, None], hidden, jnp.nan)
    found = value_and_gradients(model, labels, params, broken)
    assert_close(found, value_and_gradients(model, labels, params, hidden))
    assert not np.any(found[1][1][:, 6:])


@pytest.mark.slow
def test_weights_with_adapters_and_quantized_weights(shallow, hidden, set_chunk):
    model, params = shallow
    model = replace(
        model,
        config=replace(model.config, decoder=replace(model.config.decoder, tie_embeddings=False)),
    )
    table = params["decoder"]["embed"]
    rng = np.random.default_rng(2)
    a, b = (jnp.array(rng.normal(size=shape), jnp.float32) for shape in ((3, 64), (len(table), 3)))
    quantized = Quantized(*map(jnp.array, quantize_rows(np.asarray(table), None)))
    for w in (table, quantized):
        adapted = {**params["decoder"], "unembed": LowRank(w, a, b)}

        def gradients(adapter, hidden, decoder=adapted):
            w = replace(decoder["unembed"], a=adapter)
            return weighted_sum(model, LABELS, {"decoder": {**decoder, "unembed": w}}, hidden)[0]

        expected = jax.grad(gradients, (0, 1))(a, hidden)
        set_chunk(2)
        assert_close(jax.grad(gradients, (0, 1))(a, hidden), expected)
        set_chunk(T)


@pytest.mark.slow
@pytest.mark.optimized
def test_the_gradient_of_a_bfloat16_table_is_summed_in_float32(shallow, hidden, set_chunk):
    """In bfloat16, a sum over many chunks would lose most of a token's small gradients."""
    model, params = shallow
    labels = np.full((B, 512), 5, np.int32)
    hidden = jnp.tile(hidden[:, :1], (1, 512, 1)).astype(jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), {"decoder": params["decoder"]})

    def gradient(params):
        found = map_label_logits(label_log_probs, model, params, hidden, jnp.array(labels))
        return jnp.sum(found)

    expected = jax.grad(gradient)(params)["decoder"]["embed"]
    set_chunk(1)
    found = jax.grad(gradient)(params)["decoder"]["embed"]
    assert found.dtype == jnp.bfloat16
    assert_close(found, expected, 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("shape, rules", [((8, 1), FSDP), ((4, 2), TENSOR_FSDP)])
def test_chunks_on_a_mesh(shallow, lay, set_chunk, shape, rules):
    """A chunk is as large on each device as on a single device."""
    model, params = shallow
    placed, mesh = lay(params, model.config, shape, rules)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    hidden = jnp.array(np.random.default_rng(3).normal(size=(8, T, 64)), jnp.float32)
    labels = np.tile(LABELS, (4, 1))
    expected = value_and_gradients(model, labels, params, hidden)
    set_chunk(2, rows=1)
    found = value_and_gradients(model, labels, placed, jax.device_put(hidden, rows))
    found = found[0], (found[1][0]["decoder"], found[1][1])
    assert_close(found, (expected[0], (expected[1][0]["decoder"], expected[1][1])))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_positions(monkeypatch, shallow):
    """A training loss over 4096 positions holds the logits of 64 positions, in several copies."""
    model, params = shallow
    V, D = model.config.decoder.vocab_size, model.config.decoder.width
    monkeypatch.setattr(label_logits, "LOGITS_PER_CHUNK", 64 * V)
    shapes = (
        jax.eval_shape(lambda: params),
        jax.ShapeDtypeStruct((2, 2048, D), jnp.float32),
        jax.ShapeDtypeStruct((2, 2048), jnp.int32),
    )

    def loss(params, hidden, labels):
        return jnp.sum(map_label_logits(label_log_probs, model, params, hidden, labels))

    memory = jax.jit(jax.grad(loss, 1)).lower(*shapes).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4096 * V * 4
