"""Generation against the forward pass without a cache, and what must not change the tokens."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from shallow import shallow_config

from ovis_jax import presets
from ovis_jax.errors import RequestError
from ovis_jax.inference.generate import (
    decode_more,
    generate,
    make_options,
    prefill_and_decode,
    stream,
)
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.batch import Inputs
from ovis_jax.inputs.open_image import open_image
from ovis_jax.loading import load
from ovis_jax.model.ovis import Ovis, forward

WINDOW = presets.tiny().decoder.sliding_window  # 16


def text_inputs(*rows: list[int], length: int | None = None) -> Inputs:
    """Text rows, padded on the right to `length`."""
    length = length or max(len(row) for row in rows)
    tokens = np.zeros((len(rows), length), np.int32)
    positions = np.full((len(rows), length), -1, np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
        positions[b, : len(row)] = np.arange(len(row))
    return Inputs(tokens, positions, np.zeros((0, 70, 70, 3), np.float32))


def random_ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(108, 600, length).tolist()


def greedy_without_cache(
    model: Ovis, params, row: list[int], steps: int
) -> tuple[list[int], list[float]]:
    """Greedy tokens from a full forward pass per step, and their margins over the second best."""
    tokens, margins = [], []
    for _ in range(steps):
        # One length for all steps, because later positions never influence earlier ones.
        inputs = text_inputs(row + tokens, length=64)
        logits = np.asarray(forward(model, params, inputs))[0, len(row) + len(tokens) - 1]
        first, second = np.argsort(logits)[[-1, -2]]
        tokens.append(int(first))
        margins.append(float(logits[first] - logits[second]))
    return tokens, margins


@pytest.fixture(scope="module")
def ovis(shallow_checkpoint):
    return load(shallow_checkpoint)


@pytest.mark.parametrize("length", [1, 3, WINDOW - 1, WINDOW, WINDOW + 1, 40])
def test_tokens_equal_the_full_forward(ovis, length):
    """Prompts shorter than, equal to and longer than the window; generation crosses its end."""
    row = random_ids(length, seed=7)
    expected, margins = greedy_without_cache(ovis.model, ovis.params, row, 24)
    inputs = text_inputs(row, length=40)
    found = generate(ovis.model, ovis.params, inputs, max_new_tokens=24, eos_ids=()).tokens[0]
    assert min(margins) > 1e-2  # so that rounding cannot change a token
    assert found.tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("length", [3, WINDOW, 40])
def test_prefill_then_decode_equals_forward_at_every_step(ovis, length):
    """Teacher-forced logits at every step, with the cache and without."""
    row = random_ids(length + 24, seed=3)
    expected = np.asarray(forward(ovis.model, ovis.params, text_inputs(row, length=64)))[0]
    prefill = jax.jit(ovis.model.prefill, static_argnums=2)
    decode = jax.jit(ovis.model.decode)
    logits, cache = prefill(ovis.params, text_inputs(row[:length], length=40), 64)
    scale = np.abs(expected).max()
    for step in range(length, length + 24):
        np.testing.assert_allclose(logits[0], expected[step - 1], atol=1e-4 * scale, rtol=0)
        logits, cache = decode(ovis.params, jnp.array([row[step]]), cache)
    np.testing.assert_allclose(logits[0], expected[len(row) - 1], atol=1e-4 * scale, rtol=0)


def test_cache_sizes(ovis):
    """Local blocks have a ring, global blocks the full length."""
    _, cache = jax.eval_shape(
        partial(ovis.model.prefill, max_length=50), ovis.params, text_inputs(random_ids(40))
    )
    assert [keys.shape for keys, _ in cache.blocks] == [
        (1, 2, 16, 16),
        (1, 2, 50, 16),
    ]


def mixed_batch(ovis, golden) -> tuple[list, list]:
    """Prompts of different lengths with none, one and two images."""
    wide, square = (open_image(golden / "images" / f"{name}.png") for name in ("wide", "square"))
    prompts = ["Who is there?", "<image>\nCount to ten.", "First <image> then <image>. Why?"]
    return prompts, [[], [wide], [square, wide]]


@pytest.mark.slow
def test_rows_do_not_depend_on_each_other(ovis, golden):
    prompts, images = mixed_batch(ovis, golden)
    run = partial(generate, ovis.model, ovis.params, max_new_tokens=12, eos_ids=())
    together = run(ovis.processor(prompts, images))
    for b, (prompt, row_images) in enumerate(zip(prompts, images, strict=True)):
        alone = run(ovis.processor([prompt], [row_images]))
        assert together.tokens[b].tolist() == alone.tokens[0].tolist()
        np.testing.assert_allclose(together.log_probs[b], alone.log_probs[0], atol=1e-3)
    order = [2, 0, 1]
    shuffled = run(ovis.processor([prompts[i] for i in order], [images[i] for i in order]))
    assert shuffled.tokens.tolist() == together.tokens[jnp.array(order)].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_do_not_depend_on_padding(ovis, side):
    """The same row with 0, 3 and 40 positions of padding."""
    row = random_ids(21, seed=5)
    run = partial(generate, ovis.model, ovis.params, max_new_tokens=12, eos_ids=())
    expected = run(text_inputs(row)).tokens.tolist()
    for padding in (3, 40):
        inputs = text_inputs(row, length=len(row) + padding)
        if side == "left":
            inputs = Inputs(*(np.roll(a, padding, 1) for a in inputs[:2]), inputs.pixels)
        assert run(inputs).tokens.tolist() == expected


@pytest.mark.slow
def test_unused_crops_change_nothing(ovis, golden):
    prompts, images = mixed_batch(ovis, golden)
    inputs = ovis.processor(prompts[1:2], images[1:2])
    unused = np.ones((3, 70, 70, 3), np.float32)
    more = inputs._replace(pixels=np.concatenate([inputs.pixels, unused]))
    run = partial(generate, ovis.model, ovis.params, max_new_tokens=12, eos_ids=())
    assert run(more).tokens.tolist() == run(inputs).tokens.tolist()


@pytest.mark.slow
def test_stop_ids_end_rows(ovis, golden):
    """A row ends with its stop id; padding follows while other rows continue."""
    row, other = random_ids(20), random_ids(9, seed=9)
    run = partial(generate, ovis.model, ovis.params, max_new_tokens=10)
    without_stop = run(text_inputs(row, other), eos_ids=()).tokens
    stop = int(without_stop[0, 3])
    assert stop not in without_stop[0, :3].tolist() + without_stop[1].tolist()
    out = run(text_inputs(row, other), eos_ids=[stop])
    assert out.tokens[0].tolist() == without_stop[0, :4].tolist() + [0] * 6
    assert out.lengths.tolist() == [4, 10]
    assert out.tokens[1].tolist() == without_stop[1].tolist()
    assert out.log_probs[0, 4:].tolist() == [0.0] * 6


@pytest.mark.slow
def test_log_probs_are_the_model_s(ovis):
    row = random_ids(20)
    out = generate(ovis.model, ovis.params, text_inputs(row), max_new_tokens=6, eos_ids=())
    answer = out.tokens[0].tolist()
    logits = forward(ovis.model, ovis.params, text_inputs(row + answer))[0]
    expected = jax.nn.log_softmax(logits)[jnp.arange(19, 25), jnp.array(answer)]
    np.testing.assert_allclose(out.log_probs[0], expected, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chunk_size, sampling", [(1, Sampling()), (5, Sampling(0.8, 50, 0.9, 1.2)), (24, Sampling())]
)
def test_stream_equals_generate(ovis, chunk_size, sampling):
    inputs, key = text_inputs(random_ids(20), random_ids(7)), jax.random.key(4)
    arguments = dict(max_new_tokens=24, sampling=sampling, eos_ids=[566])
    full = generate(ovis.model, ovis.params, inputs, key, **arguments)
    chunks = list(stream(ovis.model, ovis.params, inputs, key, chunk_size=chunk_size, **arguments))
    for b, length in enumerate(full.lengths.tolist()):
        streamed = [t for p in chunks for t in p.tokens[b, : int(p.lengths[b])].tolist()]
        assert streamed == full.tokens[b, :length].tolist()
    assert len(chunks) <= -(-int(full.lengths.max()) // chunk_size) + 1


@pytest.mark.slow
def test_repetition_penalty_avoids_repeats(ovis):
    inputs = text_inputs(random_ids(20))
    run = partial(generate, ovis.model, ovis.params, inputs, max_new_tokens=20, eos_ids=())
    plain = run().tokens[0].tolist()
    strong = run(sampling=Sampling(repetition_penalty=1e6)).tokens[0].tolist()
    assert len(set(plain)) < 20 and len(set(strong)) == 20


@pytest.mark.slow
def test_sampling_depends_on_the_key(ovis):
    run = partial(generate, ovis.model, ovis.params, text_inputs(random_ids(20)), max_new_tokens=16)
    sampling = Sampling(temperature=2.0)
    first, again, other = (
        run(jax.random.key(i), sampling=sampling).tokens.tolist() for i in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.slow
def test_inside_the_callers_jit_and_vmap(ovis):
    """A caller's program with a traced temperature, a traced key and a vmap over keys."""
    inputs = text_inputs(random_ids(20))

    @jax.jit
    def draw(params, key, temperature):
        sampling = Sampling(temperature=temperature, top_p=0.9)
        return generate(ovis.model, params, inputs, key, max_new_tokens=8, sampling=sampling).tokens

    keys = jax.random.split(jax.random.key(0), 3)
    alone = jnp.stack([draw(ovis.params, key, 1.5) for key in keys])
    mapped = jax.vmap(draw, in_axes=(None, 0, None))(ovis.params, keys, 1.5)
    assert mapped.tolist() == alone.tolist()
    greedy = generate(ovis.model, ovis.params, inputs, max_new_tokens=8).tokens
    assert draw(ovis.params, keys[0], 0.0).tolist() == greedy.tolist()


@pytest.mark.slow
def test_known_shapes_compile_nothing(ovis, golden):
    """Another prompt in the same buckets, with other sampling values, stop ids and key."""
    prompts, images = mixed_batch(ovis, golden)
    arguments = dict(max_new_tokens=8, sampling=Sampling(0.7, 40, 0.9, 1.1), eos_ids=[1, 107])
    first = ovis.processor(prompts[1:2], images[1:2])
    generate(ovis.model, ovis.params, first, jax.random.key(0), **arguments)
    list(stream(ovis.model, ovis.params, first, jax.random.key(0), **arguments))
    second = ovis.processor(["<image>\nWhy? Red."], images[1:2])
    assert second.tokens.shape == first.tokens.shape
    assert not np.array_equal(second.tokens, first.tokens)
    key = jax.random.key(1)
    arguments |= dict(sampling=Sampling(1, 7, 0.5, 2), eos_ids=[1, 108])
    with compilations() as compiled:
        generate(ovis.model, ovis.params, second, key, **arguments)
        list(stream(ovis.model, ovis.params, second, key, **arguments))
        assert compiled == []
        generate(ovis.model, ovis.params, second, key, max_new_tokens=9)
        assert compiled  # the counter works


@pytest.mark.slow
def test_decode_donates_its_cache(ovis):
    """The compiled step updates the complete cache in place."""
    inputs = text_inputs(random_ids(40), random_ids(30))
    options = make_options("generate", ovis.model, ovis.params, inputs, None, 64, Sampling(), None)
    state, _ = jax.eval_shape(
        lambda params: prefill_and_decode(ovis.model, params, inputs, options, 64, 1), ovis.params
    )
    step = decode_more.lower(ovis.model, ovis.params, state, options, jnp.int32(1), 1).compile()
    cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache))
    assert step.memory_analysis().alias_size_in_bytes >= cache
    state, _ = prefill_and_decode(ovis.model, ovis.params, inputs, options, 64, 1)
    decode_more(ovis.model, ovis.params, state, options, jnp.int32(1), 1)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.cache))


@pytest.mark.slow
def test_bfloat16_generates(shallow_checkpoint):
    """The tokens are among the best of the forward pass without a cache, up to rounding."""
    ovis = load(shallow_checkpoint, dtype="bfloat16")
    rows = [random_ids(20), random_ids(11, seed=2)]
    out = generate(ovis.model, ovis.params, text_inputs(*rows), max_new_tokens=8, eos_ids=())
    for b, row in enumerate(rows):
        logits = forward(ovis.model, ovis.params, text_inputs(row + out.tokens[b].tolist()))[0]
        for step in range(8):
            at = np.asarray(logits[len(row) - 1 + step])
            assert at.max() - at[int(out.tokens[b, step])] <= 1.0  # two roundings of one state


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0, expected at least 1"),
        (dict(max_new_tokens=4, sampling=Sampling(temperature=1.0)), "needs a key"),
        (dict(max_new_tokens=4, sampling=Sampling(temperature=-1.0)), "temperature is -1.0"),
        (
            dict(max_new_tokens=4, sampling=Sampling(repetition_penalty=np.ones(3))),
            r"repetition_penalty has shape \(3,\), expected a number or one value for each",
        ),
    ],
)
def test_invalid_requests(ovis, change, message):
    with pytest.raises(RequestError, match=message):
        generate(ovis.model, ovis.params, text_inputs(random_ids(4)), **change)


def test_invalid_chunk_size_and_cache_length(ovis):
    inputs = text_inputs(random_ids(4))
    with pytest.raises(RequestError, match="chunk_size is 0"):
        stream(ovis.model, ovis.params, inputs, max_new_tokens=4, chunk_size=0)
    with pytest.raises(RequestError, match="max_length is 3, the prompts take 4"):
        ovis.model.prefill(ovis.params, inputs, 3)


@pytest.mark.slow
def test_images_and_tokens_are_sampled_with_different_keys(ovis, monkeypatch):
    used = []
    prefill = Ovis.prefill

    def spied(self, params, inputs, max_length, key):
        jax.debug.callback(lambda data: used.append(data.tolist()), jax.random.key_data(key))
        return prefill(self, params, inputs, max_length, key)

    monkeypatch.setattr(Ovis, "prefill", spied)
    key, inputs = jax.random.key(3), text_inputs(random_ids(7))
    generate(ovis.model, ovis.params, inputs, key, max_new_tokens=2)
    jax.effects_barrier()
    parts = jax.vmap(
        partial(jax.random.fold_in, jax.random.wrap_key_data(jnp.array(used[0], jnp.uint32)))
    )
    tokens = jax.vmap(partial(jax.random.fold_in, key))
    drawn = [jax.random.key_data(x(jnp.arange(64))).tolist() for x in (parts, tokens)]
    assert not {tuple(x) for x in drawn[0]} & {tuple(x) for x in drawn[1]}


@pytest.mark.exhaustive
def test_untied_and_hard_tokens():
    """Configs that no golden file has: an untied unembedding, and one-hot visual words."""
    shallow = shallow_config()
    config = dataclasses.replace(
        shallow,
        decoder=dataclasses.replace(shallow.decoder, tie_embeddings=False),
        visual_tokenizer=dataclasses.replace(
            shallow.visual_tokenizer, tokenize_function="gumbel_argmax"
        ),
    )
    model = Ovis(config)
    params = jax.jit(model.init)(jax.random.key(0))
    pixels = np.random.default_rng(0).normal(size=(1, 70, 70, 3)).astype(np.float32)
    row = [2, -301, *[-300] * 9, -302, -305, 120]
    inputs = text_inputs(row)._replace(pixels=pixels)
    out = [
        generate(model, params, inputs, key, max_new_tokens=4)
        for key in (None, jax.random.key(0), jax.random.key(0), jax.random.key(1))
    ]
    assert out[1].log_probs.tolist() == out[2].log_probs.tolist() != out[3].log_probs.tolist()
    assert out[0].log_probs.tolist() != out[1].log_probs.tolist()
