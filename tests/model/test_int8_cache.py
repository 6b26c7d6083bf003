"""The int8 KV cache: its error, its writes, and that chunks, padding and meshes change nothing."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import measured
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ovis_jax import generate
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model import kv_cache
from ovis_jax.model.plain_attention import attend
from ovis_jax.model.quantized_kv import QuantizedKV, quantize_kv
from ovis_jax.sharding import TENSOR

LENGTHS = (75, 70)
"""Positions of two prompts, more than twice the 32 slots of a local block."""


@pytest.fixture(scope="module")
def int8(shallow):
    """The model with an int8 cache, and its parameters."""
    model, params = shallow
    return replace(model, kv_cache_dtype="int8"), params


def prompts() -> Inputs:
    tokens = np.random.default_rng(0).integers(108, 600, (2, max(LENGTHS))).astype(np.int32)
    columns = np.arange(max(LENGTHS), dtype=np.int32)
    positions = np.stack([np.where(columns < n, columns, -1) for n in LENGTHS])
    return Inputs(tokens, positions, np.zeros((0, 70, 70, 3), np.float32))


def relative_error(found, expected) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.abs(found - expected).max() / np.abs(expected).max()


def test_keys_and_values_are_rounded_to_half_a_step():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 16)).at[1, 2, 3].set(0)
    found = quantize_kv(x)
    assert (found.q.dtype, found.scale.dtype) == (jnp.int8, jnp.float32)
    assert jnp.max(jnp.abs(found.q), axis=-1).tolist() == (127 * np.any(x, axis=-1)).tolist()
    error = np.abs(np.asarray(found.dequantized(jnp.float32)) - x)
    assert (error <= 0.5001 * np.asarray(found.scale)[..., None]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_equals_that_over_dequantized_keys_and_values(dtype):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 4, 40, 16), dtype) for i in range(3))
    q, mask = q.swapaxes(1, 2)[:, :3], jnp.arange(40)[None, None] < jnp.array([[[40]], [[7]]])
    mask = jnp.broadcast_to(mask, (2, 3, 40))
    run = partial(attend, q, mask=mask, scale=0.25, cap=50.0)
    int8 = quantize_kv(k), quantize_kv(v)
    found, expected = run(*int8), run(*kv_cache.as_arrays(int8, jnp.dtype(dtype)))
    assert found.dtype == expected.dtype == jnp.dtype(dtype)
    assert relative_error(found, expected) < {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    error = relative_error(found, run(k, v))
    measured.record(f"attention over int8 in {dtype}, relative", error, 2e-2)
    assert 1e-4 < error < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 11])
def test_writing_on_a_tpu_equals_writing_elsewhere(rows):
    shape = (rows, 2, 96, 16)
    old, new = (
        quantize_kv(jax.random.normal(jax.random.key(i), (*shape[:2], n, 16)))
        for i, n in enumerate((96, 1))
    )
    positions = jnp.array([31, 0, 95, 32, 96, 63, 64, 200, 1, 30, 33][:rows])
    expected = kv_cache.append_token((old, old), (new, new), positions[:, None])[0]
    column = (jnp.arange(rows), slice(None), positions % 96)
    assert (expected.q[column] == new.q[:, :, 0]).all()
    assert (expected.scale[column] == new.scale[:, :, 0]).all()
    found = jax.jit(kv_cache._write_tiles)(old.q, new.q, positions % 96)
    np.testing.assert_array_equal(found, expected.q)
    assert (expected.q != old.q).any(axis=(1, 3)).sum() == rows  # nothing else is written


def test_a_cache_has_whole_tiles(int8):
    model, params = int8
    prefill = partial(model.prefill, max_length=80)
    _, built = jax.eval_shape(prefill, params, prompts())
    empty = jax.eval_shape(lambda: model.empty_cache(2, 80, jnp.float32))
    assert built.blocks == empty.blocks
    shapes = [(x.q.shape, x.scale.shape) for pair in built.blocks for x in pair]
    assert shapes == 2 * [((2, 2, 32, 16), (2, 2, 32))] + 2 * [((2, 2, 96, 16), (2, 2, 96))]


@pytest.mark.slow
def test_chunks_of_prompts(shallow, int8):
    """Chunks give the logits of whole prompts; and both are close to those without rounding."""
    model, params = int8
    inputs = prompts()
    expected, full_cache = jax.jit(model.prefill, static_argnums=2)(params, inputs, 80)
    exact, exact_cache = jax.jit(shallow[0].prefill, static_argnums=2)(params, inputs, 80)
    extend, decode = jax.jit(model.extend), jax.jit(model.decode)
    cache, logits = model.empty_cache(2, 80, jnp.float32), expected
    for start in range(0, max(LENGTHS), 15):
        columns = slice(start, start + 15)
        tokens, positions = inputs.tokens[:, columns], inputs.positions[:, columns]
        visual = np.zeros((*tokens.shape, model.config.decoder.width), np.float32)
        logits, cache = extend(params, tokens, positions, visual, cache, jnp.arange(2))
    assert cache.lengths.tolist() == list(LENGTHS)

    def check(logits, expected, exact) -> None:
        assert relative_error(logits, expected) < 5e-3  # another order of sums may tip a rounding
        error = relative_error(expected, exact)
        measured.record("logits with an int8 cache, relative", error, 3e-2)
        assert 1e-4 < error < 3e-2

    check(logits, expected, exact)
    for block, true in zip(cache.blocks, full_cache.blocks, strict=True):
        slots = kv_cache.length(block)
        stored = (kv_cache.slot_positions(cache.lengths, slots) >= 0)[:, None, :, None]
        for x, y in zip(block, true, strict=True):
            assert isinstance(x, QuantizedKV) and isinstance(y, QuantizedKV)
            assert np.abs(np.where(stored, np.int32(x.q) - np.int32(y.q), 0)).max() <= 1
    for tokens in (jnp.array([200, 300]), jnp.array([400, 500])):
        logits, cache = decode(params, tokens, cache)
        expected, full_cache = decode(params, tokens, full_cache)
        exact, exact_cache = jax.jit(shallow[0].decode)(params, tokens, exact_cache)
        check(logits, expected, exact)


@pytest.mark.exhaustive
def test_rows_and_padding_do_not_matter(int8):
    model, params = int8
    inputs = prompts()
    run = partial(generate, model, params, max_new_tokens=30, eos_ids=())
    together = run(inputs)
    for row, length in enumerate(LENGTHS):
        tokens, positions = (x[row : row + 1, :length] for x in inputs[:2])
        alone = run(Inputs(tokens, positions, inputs.pixels))
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[row], atol=2e-2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("shape", [(4, 2), (2, 1)])
def test_on_a_mesh(int8, lay, shape):
    model, params = int8
    placed, mesh = lay(params, model.config, shape, TENSOR)
    inputs = jax.tree.map(lambda x: np.concatenate([x, x]), prompts())
    expected = generate(model, params, inputs, max_new_tokens=6, eos_ids=())
    found = generate(model, placed, inputs, max_new_tokens=6, eos_ids=())
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=2e-2)
    # Each device of a TPU writes into its own rows and heads.
    sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
    rows = jax.device_put(jnp.zeros((4, 2, 64, 16), jnp.int8), sharding)
    values, slots = jnp.ones((4, 2, 1, 16), jnp.int8), jnp.array([0, 31, 32, 63])
    write = jax.jit(partial(kv_cache.run_kernel_per_device, kv_cache._write_tiles))
    compiled = write.lower(rows, values, slots).compile()
    assert "all-gather" not in compiled.as_text()
    written = np.asarray(compiled(rows, values, slots)).any(axis=(1, 3))
    assert [np.flatnonzero(row).tolist() for row in written] == [[0], [31], [32], [63]]
