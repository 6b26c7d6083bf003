"""Visual words against numpy on the full distributions."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovis_jax import nearest_tokens, shared_words, visual_words
from ovis_jax.errors import RequestError
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model import visual_tokenizer
from ovis_jax.model.ovis import Ovis
from ovis_jax.sharding import TENSOR

CROPS, K = 3, 5


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    pixels = np.random.default_rng(0).normal(size=(CROPS, 70, 70, 3)).astype(np.float32)
    return Inputs(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32), pixels)


@pytest.fixture(scope="module")
def sharp(shallow, change_param):
    """Random parameters whose distributions are not nearly uniform."""
    model, params = shallow
    return model, change_param(params, "visual_tokenizer/norm/scale", lambda x: 4 * x)


@pytest.fixture(scope="module")
def expected(sharp, inputs) -> np.ndarray:
    """Float64 distributions [I, M, words]."""
    model, params = sharp
    logits = jax.jit(model.embed_images_with_states)(params, inputs.pixels).tokens.logits
    z = np.asarray(logits, np.float64)
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def check(found, expected: np.ndarray) -> None:
    order = np.argsort(-expected, axis=-1, kind="stable")[..., :K]
    best = np.take_along_axis(expected, order, axis=-1)
    apart = (best[..., :-1] - best[..., 1:] > 1e-4).all(axis=-1)
    assert apart.sum() > 10
    np.testing.assert_array_equal(np.asarray(found.words)[apart], order[apart])
    np.testing.assert_allclose(found.probabilities, best, atol=1e-5)
    entropy = -(expected * np.log(expected)).sum(axis=-1)
    assert entropy.min() < entropy.max() - 0.3
    np.testing.assert_allclose(found.entropy, entropy, atol=1e-4)
    np.testing.assert_allclose(found.effective, np.exp(entropy), rtol=1e-4)
    np.testing.assert_allclose(found.total, 1.0, atol=1e-5)
    np.testing.assert_allclose(found.mean, expected.mean(axis=1), atol=1e-5)


@pytest.mark.slow
def test_statistics(sharp, inputs, expected):
    check(visual_words(*sharp, inputs, k=K), expected)


@pytest.mark.slow
def test_statistics_in_chunks(sharp, inputs, expected, monkeypatch):
    """The chunks are smaller than a crop, and no array holds all distributions."""
    monkeypatch.setattr(visual_tokenizer, "VISUAL_TOKENS_PER_CHUNK", 8)
    model, params = sharp
    model = dataclasses.replace(
        model, attention_kernel="plain"
    )  # so that the program is compiled again
    lowered = jax.jit(partial(visual_words, model, k=K)).lower(params, inputs)
    M, words = expected.shape[1:]
    text = lowered.as_text()
    assert f"tensor<{CROPS}x{M}x{K}xf32>" in text
    assert f"tensor<{CROPS}x{M}x{words}x" not in text
    check(visual_words(model, params, inputs, k=K), expected)


def test_padding_words_on_a_mesh_do_not_count(sharp, inputs, expected, lay):
    model, params = sharp
    laid, mesh = lay(params, model.config, (1, 2), TENSOR)
    words = model.config.visual_tokenizer.num_words
    assert laid["visual_tokenizer"]["head"].shape[0] > words
    with jax.set_mesh(mesh):
        found = visual_words(model, laid, inputs, k=K)
    assert found.mean.shape == (CROPS, words)
    check(found, expected)


def test_a_single_word_has_no_entropy(sharp, inputs):
    model, params = sharp
    tokenizer = dataclasses.replace(model.config.visual_tokenizer, tokenize_function="st_argmax")
    model = Ovis(dataclasses.replace(model.config, visual_tokenizer=tokenizer))
    found = visual_words(model, params, inputs, k=1)
    assert (found.probabilities == 1).all() and (found.entropy == 0).all()
    assert (found.effective == 1).all()


def test_shared_words_by_hand():
    first = np.array([0.5, 0.3, 0.2, 0.0], np.float32)
    second = np.array([0.1, 0.0, 0.25, 0.65], np.float32)
    found = shared_words(first, second, k=2)
    assert found.mass == pytest.approx(0.3)
    assert found.words.tolist() == [2, 0]
    assert found.first.tolist() == pytest.approx([0.2, 0.5])
    assert found.second.tolist() == pytest.approx([0.25, 0.1])


def test_rows_of_zeros_have_cosine_zero():
    params = {"decoder": {"embed": jnp.array([[1.0, 0], [0, 0], [0, 1]])}}
    _, cosines = nearest_tokens(params, jnp.zeros((1, 2)), k=3)
    assert cosines.tolist() == [[0, 0, 0]]


def test_nearest_tokens(sharp):
    """A text embedding is nearest to itself, whatever its norm."""
    params = sharp[1]
    table = np.asarray(params["decoder"]["embed"], np.float64)
    rows = np.asarray(params["visual_embedding"], np.float64)[:4]
    mixed = np.concatenate([table[[7, 300]] * 5, rows, np.zeros_like(rows[:1])])
    ids, cosines = nearest_tokens(params, mixed.astype(np.float32), k=3)
    assert ids[:2, 0].tolist() == [7, 300]
    np.testing.assert_allclose(cosines[:2, 0], 1, atol=1e-5)
    norms = np.linalg.norm(table, axis=1)
    expected = rows @ table.T / np.linalg.norm(rows, axis=1)[:, None] / norms
    np.testing.assert_allclose(cosines[2:6], -np.sort(-expected)[:, :3], atol=1e-5)
    assert ids[2:6, 0].tolist() == expected.argmax(axis=1).tolist()
    assert (cosines[6] == 0).all()


def test_bad_requests(sharp, inputs):
    model, params = sharp
    words = model.config.visual_tokenizer.num_words
    with pytest.raises(RequestError, match=f"k is {words + 1}, expected 1 to {words}"):
        visual_words(model, params, inputs, k=words + 1)
    with pytest.raises(RequestError, match="no image"):
        visual_words(model, params, inputs._replace(pixels=inputs.pixels[:0]))
    with pytest.raises(RequestError, match="k is 0"):
        nearest_tokens(params, params["visual_embedding"], k=0)
    with pytest.raises(RequestError, match="k is 5, expected 1 to 4: there are 4 visual words"):
        shared_words(np.ones(4, np.float32), np.ones(4, np.float32), k=5)
