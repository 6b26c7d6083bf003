"""Quantized matrices: their products, lookups and derivatives, and how close rounding comes."""

from functools import partial

import jax
import jax.numpy as jnp
import measured
import ml_dtypes
import numpy as np
import pytest

from ovis_jax import forward, load, presets
from ovis_jax.errors import OvisError
from ovis_jax.model.int4_matmul import multiply_in_kernel
from ovis_jax.model.linear import LowRank, Quantized, linear, lookup
from ovis_jax.model.visual_tokenizer import embed_words
from ovis_jax.quantization import (
    Quantization,
    choose_quantization,
    find_undivided,
    pack_int4,
    quantize_rows,
    unpack_int4,
)

RNG = np.random.default_rng(0)


def normal(*shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), dtype)


def quantized(rows: int, inputs: int, group: int | None = None) -> tuple[Quantized, np.ndarray]:
    """A matrix, and the same as float64."""
    q, scale = quantize_rows(RNG.normal(size=(rows, inputs)).astype(np.float32), group)
    matrix = Quantized(jnp.asarray(q), jnp.asarray(scale))
    wide = q.astype(np.float64) * scale[..., None]
    return matrix, wide if group is None else wide.swapaxes(0, 1).reshape(rows, inputs)


def check(name: str, difference: float, tolerance: float) -> None:
    measured.record(name, difference, tolerance)
    assert difference <= tolerance


def relative_difference(found, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("group", [8, 32, 128])
def test_products_with_int4_are_those_of_the_dequantized_matrix(rows, group):
    w, exact = quantized(64, 256, group)
    x = normal(2, rows, 256)
    expected = np.asarray(x, np.float64) @ exact.T
    assert w.shape == exact.shape
    np.testing.assert_array_equal(w.dequantized(jnp.float32), exact.astype(np.float32))
    check("int4 product: float32", relative_difference(linear(x, w), expected), 1e-6)
    # bfloat16 rounds every weight and every activation to 8 bits.
    found = linear(x.astype(jnp.bfloat16), w)
    assert found.dtype == jnp.bfloat16
    check("int4 product: bfloat16", relative_difference(found, expected), 1e-2)


def test_large_int4_matrices_are_multiplied_in_tiles(monkeypatch):
    w, exact = quantized(48, 64, 32)
    x = normal(5, 64)
    monkeypatch.setattr("ovis_jax.model.int4_matmul._MAX_TILE_SIZE", 16 * 64)
    text = str(jax.make_jaxpr(linear)(x, w))
    assert "i4[2,16,32]" in text
    assert relative_difference(linear(x, w), np.asarray(x, np.float64) @ exact.T) < 1e-6


@pytest.mark.parametrize("rows", [1, 16, 70])
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(64, 64, 32), (192, 512, 128)])
def test_the_gpu_kernel_gives_the_plain_product(rows, outputs, inputs, group):
    w, exact = quantized(outputs, inputs, group)
    x = normal(rows, inputs, dtype=jnp.bfloat16)
    found = multiply_in_kernel(x, w.q, w.scale, interpret=True)
    expected = np.asarray(x, np.float64) @ exact.T
    check("int4 kernel: output", relative_difference(found, expected), 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 9])
def test_products_with_int8_round_the_rows_on_a_cpu(dtype, rows):
    w, exact = quantized(48, 200)
    x = normal(rows, 200, dtype=dtype).at[0, 3].set(0)
    wide = np.asarray(x, np.float64)
    rounded, scale = quantize_rows(np.asarray(x), None)
    expected = (rounded.astype(np.float64) * scale[:, None]) @ exact.T
    found = linear(x, w, out_dtype=jnp.float32)
    assert relative_difference(found, expected) < 2e-3  # a number halfway may round either way
    check("int8 product on a CPU", relative_difference(found, wide @ exact.T), 2e-2)
    zeros = linear(jnp.zeros_like(x), w)
    assert not np.any(zeros)


@pytest.mark.parametrize("group", [None, 32])
def test_the_derivative_is_that_of_the_dequantized_matrix(group):
    w, exact = quantized(24, 64, group)
    x, dx, dy = normal(4, 64), normal(4, 64), normal(4, 24)
    _, tangent = jax.jvp(partial(linear, w=w), (x,), (dx,))
    assert relative_difference(tangent, np.asarray(dx, np.float64) @ exact.T) < 1e-5
    (gradient,) = jax.vjp(partial(linear, w=w), x)[1](dy)
    assert relative_difference(gradient, np.asarray(dy, np.float64) @ exact) < 1e-5
    batched = jax.vmap(lambda x: linear(x[None], w)[0])(x)
    assert relative_difference(batched, np.asarray(linear(x, w))) < 1e-6


@pytest.mark.parametrize("group", [None, 32])
def test_adapters_are_added_to_a_quantized_matrix(group):
    w, exact = quantized(24, 64, group)
    a, b, x = normal(2, 64), normal(24, 2), normal(3, 64)
    adapted = LowRank(w, a, b)
    expected = np.asarray(linear(x, w)) + np.asarray(x) @ np.asarray(a).T @ np.asarray(b).T
    assert relative_difference(linear(x, adapted), expected) < 1e-5
    merged = exact + np.asarray(b, np.float64) @ np.asarray(a, np.float64)
    assert relative_difference(adapted.merged(), merged) < 1e-6


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 3)])
@pytest.mark.parametrize("in_loop", [False, True])
def test_lookup_returns_dequantized_rows(shape, in_loop):
    table, exact = quantized(40, 16)
    rows = jnp.asarray(RNG.integers(0, 40, shape), jnp.int32)
    found = lookup(table, rows, jnp.float32, in_loop=in_loop)
    np.testing.assert_array_equal(found, exact.astype(np.float32)[np.asarray(rows)])


def test_visual_embeddings_of_an_int8_table():
    table, exact = quantized(40, 16)
    probabilities = jax.nn.softmax(normal(2, 3, 35))
    expected = np.asarray(probabilities, np.float64) @ exact[:35]
    assert relative_difference(embed_words(probabilities, table), expected) < 1e-6


@pytest.mark.parametrize("group", [None, 8, 32])
def test_numbers_are_rounded_to_the_nearest(group):
    rows = RNG.normal(size=(6, 64)).astype(np.float32)
    rows[2] = 0
    rows[3, :32] = 0
    q, scale = quantize_rows(rows, group)
    if group is None:
        error, step = np.abs(q * scale[:, None] - rows), scale[:, None]
        assert q.dtype == np.int8 and np.abs(q).max() == 127
    else:
        parts = rows.reshape(6, -1, group).swapaxes(0, 1)
        error, step = np.abs(q.astype(np.float32) * scale[..., None] - parts), scale[..., None]
        # Positive numbers beyond 7.5 steps are rounded to 7.
        step = np.where(parts / np.where(step == 0, 1, step) > 7, 2 * step, step)
        assert q.dtype == ml_dtypes.int4 and q.astype(int).min() == -8
    assert np.all(error <= np.abs(step) / 2 * 1.00001)
    assert np.all(scale[..., 2] == 0) and not np.any(q[..., 2, :].astype(int))


def test_packing_is_lossless():
    q = RNG.integers(-8, 8, (4, 10, 16)).astype(np.int8).astype(ml_dtypes.int4)
    packed = pack_int4(q)
    assert (packed.dtype, packed.shape) == (np.uint8, (10, 32))
    assert packed[3, 0] == (int(q[0, 3, 0]) & 15) | (int(q[0, 3, 1]) & 15) << 4
    np.testing.assert_array_equal(unpack_int4(packed, 16).astype(int), q.astype(int))


def test_rows_of_very_small_numbers_become_zero():
    q, scale = quantize_rows(np.full((1, 8), 1e-44, np.float32), None)
    assert not q.any() and scale[0] == 0


def test_the_group_size_divides_all_inputs():
    config = presets.ovis1_6_gemma2_9b()
    assert choose_quantization(config, "int4") == Quantization("int4", 128)
    assert choose_quantization(presets.tiny(), "int4").group_size == 64
    assert find_undivided(config, Quantization("int4", 4096))[0][0] == "decoder/block_0/attn/q"
    with pytest.raises(OvisError, match="quantization 'int3': expected int8 or int4"):
        choose_quantization(config, "int3")


@pytest.mark.exhaustive
@pytest.mark.parametrize(("quantization", "tolerance"), [("int8", 0.05), ("int4", 0.3)])
def test_a_quantized_model_is_close(quantization, tolerance):
    """The logits of ovis-tiny differ by much less than their spread."""
    exact, rounded = load("ovis-tiny"), load("ovis-tiny", quantization=quantization)
    image = np.full((100, 60, 3), 200, np.uint8)
    inputs = exact.processor("What is in the picture?", image)
    expected = np.asarray(forward(exact.model, exact.params, inputs), np.float64)
    found = np.asarray(forward(rounded.model, rounded.params, inputs), np.float64)
    error = np.sqrt(np.mean(np.square(found - expected))) / expected.std()
    check(f"ovis-tiny in {quantization}: logits", error, tolerance)
    matrix = rounded.params["decoder"]["block_0"]["mlp"]["down"]
    assert matrix.q.dtype == {"int8": jnp.int8, "int4": jnp.int4}[quantization]
    assert rounded.params["decoder"]["embed"].q.dtype == jnp.int8
