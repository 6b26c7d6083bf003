"""Details that the golden files do not cover, against float64 and tables written by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import Array

from ovis_jax import presets
from ovis_jax.config import TokenizeFunction
from ovis_jax.model import decoder, vision
from ovis_jax.model.kv_cache import slot_positions
from ovis_jax.model.layers import apply_rope, gelu, layer_norm, rms_norm, softcap
from ovis_jax.model.plain_attention import attend, visible
from ovis_jax.model.visual_tokenizer import VisualTokenizer, embed_words, tokenize

pytestmark = pytest.mark.optimized

TINY = presets.tiny()


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(shape).standard_normal(shape)).astype(np.float32)


def relative_error(got: Array, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    return float(np.abs(np.asarray(got, np.float64) - expected).max() / np.abs(expected).max())


def apply(module: nn.Module, params: Any, *inputs: Array | None) -> Any:
    return module.apply({"params": params}, *inputs)


# ----- epsilons of norms, on inputs so small that the epsilons matter


def rms_norm64(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    x, scale = x.astype(np.float64), scale.astype(np.float64)
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * (1 + scale)


def layer_norm64(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    x, scale, bias = (a.astype(np.float64) for a in (x, scale, bias))
    centred = x - np.mean(x, -1, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + eps) * scale + bias


@pytest.mark.slow
def test_decoder_norms_with_eps_1e_6():
    c = replace(TINY.decoder, depth=0)
    x, scale, embed = normal(1, 3, 64, scale=1e-4), normal(64), normal(600, 64)
    params = {"embed": jnp.array(embed), "final_norm": jnp.array(scale)}
    got = apply(decoder.Decoder(c), params, jnp.array(x), jnp.arange(3)[None])

    def logits64(eps: float) -> np.ndarray:
        return 30 * np.tanh(rms_norm64(x * np.float32(8), scale, eps) @ embed.T / 30)

    right, wrong = (relative_error(got.logits, logits64(eps)) for eps in (1e-6, 1e-5))
    assert right <= 1e-5, f"eps 1e-6: {right:.1e}"
    assert wrong > 0.1, f"eps 1e-5: {wrong:.1e}"


@pytest.mark.slow
def test_vision_norms_with_eps_1e_6():
    """A block in which attention adds nothing and the MLP adds the output of its norm."""
    c = replace(TINY.vision, mlp_width=48)
    module = vision.VisionBlock(c, jnp.float32)
    x = normal(1, c.num_patches, 48, scale=1e-3)
    params = jax.tree.map(jnp.zeros_like, module.init(jax.random.key(0), jnp.array(x))["params"])
    norm = {"scale": jnp.ones(48), "bias": jnp.zeros(48)}
    # gelu(y + 40) equals y + 40, so the MLP with these biases is the identity.
    up_bias, down_bias = jnp.full(48, 40.0), jnp.full(48, -40.0)
    mlp = {"up": jnp.eye(48), "down": jnp.eye(48), "up_bias": up_bias, "down_bias": down_bias}
    got = apply(module, params | {"mlp_norm": norm, "mlp": mlp}, jnp.array(x))
    ones, zeros = np.ones(48), np.zeros(48)
    right, wrong = (
        relative_error(got, x + layer_norm64(x, ones, zeros, eps)) for eps in (1e-6, 1e-5)
    )
    assert right <= 1e-5, f"eps 1e-6: {right:.1e}"
    assert wrong > 0.1, f"eps 1e-5: {wrong:.1e}"


def test_visual_head_norms_with_eps_1e_5():
    c = TINY.visual_tokenizer
    merged, head = normal(1, 9, 192, scale=1e-3), normal(64, 192, scale=192**-0.5)
    scale, bias = normal(64), normal(64, scale=0.1)
    params = {
        "head": jnp.array(head),
        "norm": {"scale": jnp.array(scale), "bias": jnp.array(bias)},
    }
    got = apply(VisualTokenizer(c), params, jnp.array(merged))
    projected = np.asarray(got.features, np.float64) @ head.astype(np.float64).T
    right, wrong = (
        relative_error(got.logits, layer_norm64(projected, scale, bias, eps))
        for eps in (1e-5, 1e-6)
    )
    assert right <= 1e-5, f"eps 1e-5: {right:.1e}"
    assert wrong > 0.1, f"eps 1e-6: {wrong:.1e}"


# ----- embedding scale


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(jnp.bfloat16, 59.75), (jnp.float32, 59.86651992797851562)],
    ids=["bfloat16", "float32"],
)
def test_embedding_scale_is_rounded_to_the_activations(dtype: jnp.dtype, factor: float):
    """At width 3584; with weights of zero, the block returns its input."""
    c = replace(
        TINY.decoder, width=3584, depth=1, vocab_size=5, mlp_width=2, num_heads=1, num_kv_heads=1
    )
    module = decoder.Decoder(c, dtype)
    x, positions = jnp.array(normal(1, 2, 3584), dtype).at[0, 0].set(1), jnp.arange(2)[None]
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, positions)["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    states = apply(module, params, x, positions).hidden_states
    assert states[0].dtype == dtype
    np.testing.assert_array_equal(states[0][0, 0], np.full(3584, factor, dtype))
    expected = (np.asarray(x, np.float64) * factor).astype(dtype)
    np.testing.assert_array_equal(states[0], expected)


# ----- gelu, query scale


def test_gelu_is_the_tanh_approximation():
    x = np.linspace(-6, 6, 12_001)
    tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    erf = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    got = np.asarray(gelu(jnp.array(x, jnp.float32)), np.float64)
    assert np.abs(got - tanh).max() < 2e-6
    assert 4.7e-4 < np.abs(got - erf).max() < 4.8e-4


@pytest.mark.slow
@pytest.mark.parametrize("scalar", [224, 256, 7])
def test_query_scale_comes_from_the_config(scalar: int):
    """All positions are 0, so that nothing is rotated and every position sees every other."""
    c = replace(TINY.decoder, query_pre_attn_scalar=scalar, num_heads=1, num_kv_heads=1)
    x = normal(1, 5, 64, scale=3)
    w = {name: normal(16, 64, scale=0.5) for name in "qkv"} | {"o": normal(64, 16)}
    module = decoder.DecoderAttention(c, None, jnp.float32)
    params = {name: jnp.array(value) for name, value in w.items()}
    positions = jnp.zeros((1, 5), jnp.int32)
    got, _ = apply(module, params, jnp.array(x), positions, None)

    def attention64(scale: float) -> np.ndarray:
        q, k, v = (x[0].astype(np.float64) @ w[name].T for name in "qkv")
        weights = np.exp(50 * np.tanh(q @ k.T * scale / 50))
        return (weights / weights.sum(-1, keepdims=True) @ v @ w["o"].T)[None]

    right, wrong = (relative_error(got, attention64(s**-0.5)) for s in (scalar, 16))
    assert right <= 1e-5, f"scalar {scalar}: {right:.1e}"
    assert wrong > 0.01, f"head_dim 16: {wrong:.1e}"


# ----- attention masks

O, X = False, True  # noqa: E741


def test_global_mask():
    positions = jnp.array([[0, 1, 2, 3]])
    np.testing.assert_array_equal(
        visible(positions, positions, None)[0],
        [[X, O, O, O], [X, X, O, O], [X, X, X, O], [X, X, X, X]],
    )


def test_local_mask():
    positions = jnp.array([[0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(
        visible(positions, positions, 3)[0],
        [[X, O, O, O, O], [X, X, O, O, O], [X, X, X, O, O], [O, X, X, X, O], [O, O, X, X, X]],
    )


@pytest.mark.parametrize("window", [3, None])
def test_mask_of_padding(window: int | None):
    positions = jnp.array([[-1, -1, 0, 1, 2], [0, 1, -1, -1, -1]])
    seen = visible(positions, positions, window)
    np.testing.assert_array_equal(
        seen[0],
        [[O, O, O, O, O], [O, O, O, O, O], [O, O, X, O, O], [O, O, X, X, O], [O, O, X, X, X]],
    )
    np.testing.assert_array_equal(
        seen[1],
        [[X, O, O, O, O], [X, X, O, O, O], [O, O, O, O, O], [O, O, O, O, O], [O, O, O, O, O]],
    )


def test_mask_of_a_ring_depends_on_positions_only():
    ring = jnp.array([[8, 9, 6, 7], [0, 1, -1, -1], [8, 5, 6, 7]])  # 4 slots
    queries = jnp.array([[9], [1], [8]])
    np.testing.assert_array_equal(
        visible(queries, ring, 3)[:, 0], [[X, X, O, X], [X, X, O, O], [X, O, X, X]]
    )
    np.testing.assert_array_equal(
        visible(queries, ring, None)[:, 0], [[X, X, X, X], [X, X, O, O], [X, X, X, X]]
    )


def test_slot_positions_of_a_ring_of_four():
    lengths = jnp.array([0, 1, 3, 4, 5, 6, 8, 9, 8191])
    np.testing.assert_array_equal(
        slot_positions(lengths, 4),
        [
            [-1, -1, -1, -1],
            [0, -1, -1, -1],
            [0, 1, 2, -1],
            [0, 1, 2, 3],
            [4, 1, 2, 3],
            [4, 5, 2, 3],
            [4, 5, 6, 7],
            [8, 5, 6, 7],
            [8188, 8189, 8190, 8187],
        ],
    )


def test_slot_positions_of_a_full_cache_are_the_slots():
    np.testing.assert_array_equal(
        slot_positions(jnp.array([2, 5]), 5), [[0, 1, -1, -1, -1], [0, 1, 2, 3, 4]]
    )


# ----- hard visual tokens


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("function", ["gumbel_argmax", "st_argmax"])
def test_hard_tokens_are_the_most_likely_word(function: TokenizeFunction, dtype: jnp.dtype):
    logits = jnp.array([[[0.0, 2.0, 1.0], [5.0, -1.0, 4.0]], [[-3.0, -2.0, -1.0], [1.0, 1.0, 0.0]]])
    got = tokenize(logits.astype(dtype), function)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, [[[0, 1, 0], [1, 0, 0]], [[0, 0, 1], [1, 0, 0]]])


def test_gumbel_draws_words_by_their_probabilities():
    probabilities = np.array([0.1, 0.2, 0.7])
    logits = jnp.broadcast_to(jnp.log(jnp.array(probabilities)), (4, 5000, 3))
    drawn = np.asarray(tokenize(logits, "gumbel_argmax", jax.random.key(0)))
    assert set(np.unique(drawn)) == {0, 1}
    np.testing.assert_array_equal(drawn.sum(-1), 1)
    # 20000 draws: the standard deviation of a share is at most 0.0033.
    np.testing.assert_allclose(drawn.mean((0, 1)), probabilities, atol=0.015)


@pytest.mark.parametrize("function", ["softmax", "st_argmax"])
def test_only_gumbel_uses_the_key(function: TokenizeFunction):
    logits = jnp.array(normal(2, 3, 7))
    with_key = tokenize(logits, function, jax.random.key(0))
    np.testing.assert_array_equal(with_key, tokenize(logits, function))


@pytest.mark.parametrize("function", ["gumbel_argmax", "st_argmax"])
def test_a_hard_token_is_a_row_of_the_table(function: TokenizeFunction):
    c = replace(TINY.visual_tokenizer, tokenize_function=function)
    module, merged = VisualTokenizer(c), jnp.array(normal(2, 9, 192))
    params = module.init(jax.random.key(0), merged)["params"]
    tokens, table = apply(module, params, merged), jnp.array(normal(69, 64))
    rows = np.asarray(table)[np.argmax(tokens.logits, -1)]
    np.testing.assert_array_equal(embed_words(tokens.probabilities, table), rows)


# ----- bfloat16 in and out, float32 in between: results are exact and rounded once


def check_rounded_once(got: Array, exact: np.ndarray, in_bfloat16: Array) -> None:
    """Check that nearly all values equal the rounded exact ones, unlike in pure bfloat16.

    The others are so close to a tie that the error of float32 decides.
    """
    assert got.dtype == jnp.bfloat16
    expected = exact.astype(ml_dtypes.bfloat16)
    missed, missed_in_bfloat16 = (
        float(np.mean(np.asarray(a) != expected)) for a in (got, in_bfloat16)
    )
    assert missed < 2e-3, f"{missed:.2%} of the values are not the rounded exact ones"
    assert missed_in_bfloat16 > 0.1, f"{missed_in_bfloat16:.2%} in bfloat16"


def bfloat16(x: np.ndarray) -> Array:
    return jnp.array(x, jnp.bfloat16)


def exactly(x: Array | np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


COMPILED_OR_NOT = pytest.mark.parametrize("compiled", [jax.jit, lambda f: f], ids=["jit", "eager"])
Transform = Callable[[Callable[..., Array]], Callable[..., Array]]


@COMPILED_OR_NOT
def test_rms_norm_statistics(compiled: Transform):
    x, scale = bfloat16(normal(64, 512)), bfloat16(normal(512))
    got = compiled(lambda x, scale: rms_norm(x, scale, 1e-6))(x, scale)
    naive = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * (1 + scale)
    check_rounded_once(got, rms_norm64(exactly(x), exactly(scale), 1e-6), naive)


@COMPILED_OR_NOT
def test_layer_norm_statistics(compiled: Transform):
    x, scale, bias = bfloat16(normal(64, 512) + 2), bfloat16(normal(512)), bfloat16(normal(1, 512))
    got = compiled(lambda x, scale, bias: layer_norm(x, scale, bias, 1e-6))(x, scale, bias[0])
    centred = x - jnp.mean(x, -1, keepdims=True)
    deviation = jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + 1e-6)
    exact = layer_norm64(exactly(x), exactly(scale), exactly(bias[0]), 1e-6)
    check_rounded_once(got, exact, centred * deviation * scale + bias)


@COMPILED_OR_NOT
@pytest.mark.parametrize("cap", [None, 50.0])
def test_attention_scores_cap_and_softmax(compiled: Transform, cap: float | None):
    """The values form a unit matrix, so that the output equals the attention weights."""
    q, k = bfloat16(normal(1, 64, 2, 64, scale=2)), bfloat16(normal(1, 2, 64, 64, scale=2))
    v = jnp.broadcast_to(jnp.eye(64, dtype=jnp.bfloat16), (1, 2, 64, 64))
    got = compiled(lambda q, k, v: attend(q, k, v, None, scale=0.1, cap=cap))(q, k, v)
    scores = 0.1 * np.einsum("BTNH,BNSH->BTNS", exactly(q), exactly(k))
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    weights = np.exp(scores)
    naive = jax.nn.softmax(bfloat16(scores).astype(jnp.float32)).astype(jnp.bfloat16)
    check_rounded_once(got, weights / weights.sum(-1, keepdims=True), naive)


@COMPILED_OR_NOT
def test_visual_softmax(compiled: Transform):
    logits = bfloat16(normal(2, 9, 4096, scale=3))
    got = compiled(lambda x: tokenize(x, "softmax"))(logits)
    weights = np.exp(exactly(logits))
    e = jnp.exp(logits)
    check_rounded_once(got, weights / weights.sum(-1, keepdims=True), e / e.sum(-1, keepdims=True))


@pytest.mark.slow
@COMPILED_OR_NOT
@pytest.mark.parametrize("head_dim", [128, 256])
def test_rotary_angles(compiled: Transform, head_dim: int):
    """Rotated unit vectors are the cosines and sines of float32 angles, each rounded once."""
    positions = np.arange(0, 8192, 13)
    x = jnp.zeros((1, len(positions), 1, head_dim), jnp.bfloat16).at[..., : head_dim // 2].set(1)
    got = compiled(lambda x, p: apply_rope(x, p, 10_000.0))(x, jnp.array(positions)[None])
    exponents = np.arange(0, head_dim, 2) / head_dim
    frequencies = np.float32(1) / (10_000.0**exponents).astype(np.float32)
    angles = positions.astype(np.float32)[:, None] * frequencies
    assert angles.dtype == np.float32
    exact = np.concatenate([np.cos(exactly(angles)), np.sin(exactly(angles))], -1)[None, :, None]
    rough = bfloat16(positions)[:, None] * bfloat16(frequencies)
    naive = jnp.concatenate([jnp.cos(rough), jnp.sin(rough)], -1)[None, :, None]
    check_rounded_once(got, exact, naive)


@COMPILED_OR_NOT
def test_logits(compiled: Transform):
    """Sums, cap and result are float32 and keep what bfloat16 would round away."""
    module = decoder.Decoder(replace(TINY.decoder, depth=0), jnp.bfloat16)
    x, scale, embed = (bfloat16(normal(*shape)) for shape in ((1, 7, 64), (64,), (600, 64)))
    params = {"embed": embed, "final_norm": scale}
    forward = compiled(lambda params, x: apply(module, params, x, jnp.arange(7)[None]).logits)
    logits = forward(params, x)
    assert logits.dtype == jnp.float32
    normed = rms_norm64(exactly(x) * 8, exactly(scale), 1e-6).astype(ml_dtypes.bfloat16)
    exact = 30 * np.tanh(normed.astype(np.float64) @ exactly(embed).T / 30)
    assert relative_error(logits, exact) <= 1e-5
    assert np.mean(np.asarray(logits) != logits.astype(jnp.bfloat16)) > 0.9


def test_softcap_values():
    x = np.array([-1e6, -50, -1, 0, 1, 50, 1e6])
    np.testing.assert_allclose(softcap(jnp.array(x), 50.0), 50 * np.tanh(x / 50), rtol=1e-6)
