"""The chunks in which the model reads crops and prompts change no result and bound memory."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import measured
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ovis_jax import Ovis, presets
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model import kv_cache, visual_tokenizer
from ovis_jax.model.quantized_kv import QuantizedKV

LENGTHS = (41, 38)
"""Positions of two prompts, more than the window of 16 and no multiples of a chunk."""
CHUNK = 12
SLOT = -300


def crops(number: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (number, 70, 70, 3))


def prompts() -> Inputs:
    rng = np.random.default_rng(0)
    tokens = rng.integers(108, 600, (2, max(LENGTHS))).astype(np.int32)
    tokens[0, 9:18] = tokens[1, 3:12] = SLOT  # the first chunk ends within the crop of row 0
    columns = np.arange(max(LENGTHS), dtype=np.int32)
    positions = np.stack([np.where(columns < n, columns, -1) for n in LENGTHS])
    return Inputs(tokens, positions, rng.normal(size=(2, 70, 70, 3)).astype(np.float32))


def check(name: str, found, expected, tolerance: float = 1e-4) -> None:
    difference = np.abs(np.asarray(found, np.float64) - np.asarray(expected)).max()
    measured.record(name, difference, tolerance)
    assert difference <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("tokens_per_chunk", [1, 5, 12, 27])
def test_chunks_of_crops(shallow, monkeypatch, tokens_per_chunk):
    """Three crops of nine tokens give nine chunks, nine again, three, and one."""
    model, params = shallow
    monkeypatch.setattr(visual_tokenizer, "VISUAL_TOKENS_PER_CHUNK", tokens_per_chunk)
    found = jax.jit(model.embed_images)(params, crops(3))
    expected = model.embed_images_with_states(params, crops(3)).embeddings
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
def test_gradients_of_chunks_of_crops(shallow, monkeypatch):
    model, params = shallow

    def gradients(embed):
        def loss(params):
            return jnp.sum(embed(params, crops(3)) ** 2)

        return jax.jit(jax.grad(loss))({k: params[k] for k in params if k != "decoder"})

    expected = gradients(lambda *x: model.embed_images_with_states(*x).embeddings)
    monkeypatch.setattr(visual_tokenizer, "VISUAL_TOKENS_PER_CHUNK", 12)
    found = gradients(model.embed_images)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.abs(x - y).max() <= 1e-5 * largest


@pytest.mark.slow
@pytest.mark.parametrize("slots", [16, 23, 64, 96])
@pytest.mark.parametrize("size, starts", [(5, (3,)), (40, (0, 60)), (12, (90, 14)), (12, (11, 12))])
def test_a_chunk_is_written_to_its_slots_alone(slots, size, starts):
    """Also around the end of a ring buffer, in whole tiles or not, with padding on the right."""
    rows, shape = len(starts), (len(starts), 2, slots, 3)
    old = jax.random.normal(jax.random.key(0), shape)
    new = jax.random.normal(jax.random.key(1), (rows, 2, size, 3))
    positions = np.array(starts)[:, None] + np.arange(size)
    positions[-1, size - 2 :] = -1
    expected = np.array(old)
    for row, column in zip(*np.nonzero(positions >= 0), strict=True):
        expected[row, :, positions[row, column] % slots] = new[row, :, column]
    block, chunk = ((x, QuantizedKV(x, x[..., 0])) for x in (old, new))
    positions = jnp.asarray(positions)
    appended = jax.jit(kv_cache.append_chunk)(block, chunk, positions)
    # The rows belong to a larger cache, in another order.
    order = rows - jnp.arange(rows)
    larger = jax.tree.map(lambda x: jnp.zeros((rows + 2, *x.shape[1:])).at[order].set(x), block)
    larger = jax.jit(kv_cache.put_chunk)(larger, appended, positions, order)
    for keys, values in (appended, kv_cache.take_rows(larger, order)):
        np.testing.assert_array_equal(keys, expected)
        np.testing.assert_array_equal(values.scale, expected[..., 0])
    assert not any(jnp.any(x[0]) or jnp.any(x[rows + 1 :]) for x in jax.tree.leaves(larger))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_crops():
    """With 8192 visual words, the distributions would be most of the memory."""
    tiny = presets.tiny()
    model = Ovis(replace(tiny, visual_tokenizer=replace(tiny.visual_tokenizer, vocab_size=8192)))
    params = jax.eval_shape(model.init, jax.random.key(0))

    def temp_bytes(function, num_crops: int) -> int:
        pixels = jax.ShapeDtypeStruct((num_crops, 70, 70, 3), jnp.float32)
        memory = jax.jit(function).lower(params, pixels).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    distributions = 160 * 9 * 8192 * 4
    assert temp_bytes(lambda *x: model.embed_images_with_states(*x).embeddings, 160) > distributions
    assert temp_bytes(model.embed_images, 160) < 0.7 * distributions

    def gradient_of(embed):
        def gradient(params, pixels):
            def loss(trainable):
                return jnp.sum(embed({**params, **trainable}, pixels) ** 2)

            return jax.grad(loss)({k: params[k] for k in ("visual_tokenizer", "visual_embedding")})

        return gradient

    at_once = gradient_of(lambda *x: model.embed_images_with_states(*x).embeddings)
    assert temp_bytes(gradient_of(model.embed_images), 160) < 0.5 * temp_bytes(at_once, 160)


@pytest.mark.slow
def test_sharded_crops_stay_on_their_devices(shallow, monkeypatch):
    model, params = shallow
    monkeypatch.setattr(visual_tokenizer, "VISUAL_TOKENS_PER_CHUNK", 24)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    pixels = jax.device_put(crops(8), NamedSharding(mesh, PartitionSpec("data")))
    compiled = jax.jit(model.embed_images).lower(params, pixels).compile()
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
    expected = model.embed_images_with_states(params, crops(8)).embeddings
    np.testing.assert_allclose(compiled(params, pixels), expected, atol=1e-6)


@pytest.mark.slow
def test_chunks_of_prompts(shallow):
    model, params = shallow
    inputs = prompts()
    expected, full_cache = jax.jit(model.prefill, static_argnums=2)(params, inputs, 48)
    visual = jax.jit(model.embed_images)(params, inputs.pixels)  # [2, 9, D]
    extend, decode = jax.jit(model.extend), jax.jit(model.decode)
    cache, logits = kv_cache.empty_cache(model.config.decoder, 4, 48, jnp.float32), None
    rows = jnp.array([2, 0])  # of a cache with more rows, in another order
    for start in range(0, max(LENGTHS), CHUNK):
        columns = slice(start, start + CHUNK)
        missing = CHUNK - inputs.tokens[:, columns].shape[1]
        tokens, positions = (
            np.pad(x[:, columns], ((0, 0), (0, missing)), constant_values=fill)
            for x, fill in ((inputs.tokens, 0), (inputs.positions, -1))
        )
        embeddings = np.full((*tokens.shape, visual.shape[-1]), np.nan, np.float32)
        for b, row in enumerate(tokens):
            first = int(np.sum(inputs.tokens[b, :start] == SLOT))
            embeddings[b, row == SLOT] = visual[b, first : first + int(np.sum(row == SLOT))]
        logits, cache = extend(params, tokens, positions, embeddings, cache, rows)
    check("logits after chunks", logits, expected)
    assert cache.lengths.tolist() == [LENGTHS[1], 0, LENGTHS[0], 0]
    assert not any(jnp.any(x[1::2]) for x in jax.tree.leaves(cache.blocks))
    cache = jax.tree.map(lambda x: x[rows], cache)
    assert full_cache.lengths.tolist() == list(LENGTHS)
    for block, pair in enumerate(zip(cache.blocks, full_cache.blocks, strict=True)):
        stored = kv_cache.slot_positions(cache.lengths, pair[0][0].shape[2]) >= 0
        assert stored.sum() == (2 * 16, sum(LENGTHS))[block]
        for x, true in zip(*pair, strict=True):
            x, true = (jnp.where(stored[:, None, :, None], a, 0) for a in (x, true))
            check(f"cache of block {block}", x, true, 1e-5)
    for tokens in ([200, 300], [400, 500]):
        logits, cache = decode(params, jnp.array(tokens), cache)
        expected, full_cache = decode(params, jnp.array(tokens), full_cache)
        check("decoding after chunks", logits, expected)


def test_positions_hide_the_old_content_of_a_cache(shallow):
    model, params = shallow
    inputs = prompts()
    tokens, positions = inputs.tokens[:, 18:38], inputs.positions[:, :20]
    empty = kv_cache.empty_cache(model.config.decoder, 2, 48, jnp.float32)
    used = empty._replace(blocks=jax.tree.map(lambda x: x + 7.0, empty.blocks))
    extend = jax.jit(model.extend)
    visual = np.zeros((*tokens.shape, model.config.decoder.width), np.float32)
    fresh, reused = (
        extend(params, tokens, positions, visual, cache, jnp.arange(2))[0]
        for cache in (empty, used)
    )
    check("logits over a used cache", reused, fresh, 1e-5)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_a_cache_of_another_length_gives_the_same_logits(shallow, kv_cache_dtype):
    """Below and above the window of the local block."""
    model, params = shallow
    model = replace(model, kv_cache_dtype=kv_cache_dtype)
    tokens = prompts().tokens[:, 20:32]  # no crops
    positions = np.tile(np.arange(12, dtype=np.int32), (2, 1))
    visual = np.zeros((*tokens.shape, model.config.decoder.width), np.float32)
    empty = model.empty_cache(2, 14, jnp.float32)
    _, cache = jax.jit(model.extend)(params, tokens, positions, visual, empty, jnp.arange(2))
    expected, _ = jax.jit(model.decode)(params, tokens[:, 0], cache)
    for length in (96, 64, 13):
        blocks = [
            kv_cache.resize_rows(
                block, kv_cache.num_slots(model.config.decoder, i, length, kv_cache_dtype)
            )
            for i, block in enumerate(cache.blocks)
        ]
        cache = cache._replace(blocks=tuple(blocks))
        assert [kv_cache.length(x) for x in blocks] == [
            kv_cache.length(x) for x in model.empty_cache(2, length, jnp.float32).blocks
        ]
        logits, _ = jax.jit(model.decode)(params, tokens[:, 0], cache)
        check(f"logits over a cache of length {length}", logits, expected, 1e-5)


def test_the_model_prints_in_a_few_lines():
    assert len(repr(Ovis(presets.ovis1_6_gemma2_9b()))) < 1000
