"""Swapped or mistyped arguments of public functions raise a TypeError that names them."""

from functools import partial

import jax
import jaxtyping
import numpy as np
import pytest

import ovis_jax
from ovis_jax.argument_type_checks import check_argument_types


@pytest.fixture(autouse=True)
def without_jaxtyping(monkeypatch):
    """The checks of the tests would reject the arguments first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def ovis():
    return ovis_jax.load("ovis-tiny")


@pytest.mark.parametrize(
    "name, call",
    [
        ("generate", partial(ovis_jax.generate, max_new_tokens=1)),
        ("stream", partial(ovis_jax.stream, max_new_tokens=1)),
        ("forward", ovis_jax.forward),
        ("score", partial(ovis_jax.score, answers=np.zeros((1, 1, 1), np.int32))),
        ("visual_words", ovis_jax.visual_words),
        ("warmup", lambda model, params, _: ovis_jax.warmup(model, params, [], max_new_tokens=1)),
    ],
)
def test_model_params_and_inputs(ovis, name, call):
    inputs = ovis.processor("Hi")
    with pytest.raises(TypeError, match=f"{name}: model has type dict, expected an Ovis"):
        call(ovis.params, ovis.model, inputs)
    with pytest.raises(TypeError, match=f"{name}: model has type LoadedOvis, expected an Ovis"):
        call(ovis, ovis.params, inputs)
    with pytest.raises(TypeError, match=f"{name}: params has type Ovis, expected a dict"):
        call(ovis.model, ovis.model, inputs)
    if name != "warmup":
        with pytest.raises(TypeError, match=f"{name}: inputs has type str, expected Inputs"):
            call(ovis.model, ovis.params, "What is there?")


@pytest.mark.parametrize("function", [ovis_jax.generate, ovis_jax.stream, ovis_jax.warmup])
def test_generation_options(ovis, function):
    inputs = [(1, 64, 1)] if function is ovis_jax.warmup else ovis.processor("Hi")
    name, call = function.__name__, partial(function, ovis.model, ovis.params, inputs)
    with pytest.raises(TypeError, match=f"{name}: max_new_tokens has type str, expected an int"):
        call(max_new_tokens="8")
    with pytest.raises(TypeError, match=f"{name}: sampling has type float, expected a Sampling"):
        call(max_new_tokens=8, sampling=0.7)
    with pytest.raises(TypeError, match=f"{name}: eos_ids has type int, expected a sequence"):
        call(max_new_tokens=8, eos_ids=107)
    if function is not ovis_jax.generate:
        with pytest.raises(TypeError, match=f"{name}: chunk_size has type str, expected an int"):
            call(max_new_tokens=8, chunk_size="2")


@pytest.mark.parametrize("function", [ovis_jax.generate, ovis_jax.stream, ovis_jax.warmup])
@pytest.mark.parametrize(
    "key, found",
    [
        (0, r"int and shape \[\]"),
        ("0", r"str and shape \[\]"),
        (np.zeros(3, np.float32), r"ndarray and shape \[3\]"),
        (jax.random.split(jax.random.key(0), 3), r"PRNGKeyArray and shape \[3\]"),
    ],
)
def test_invalid_random_keys(ovis, function, key, found):
    inputs = [(1, 64, 0)] if function is ovis_jax.warmup else ovis.processor("Hi")

    def call(key):
        return function(ovis.model, ovis.params, inputs, key, max_new_tokens=1)

    expected = r"expected one random key, such as jax\.random\.key\(0\)"
    with pytest.raises(TypeError, match=f"{function.__name__}: key has type {found}, {expected}"):
        call(key)
    if not isinstance(key, str):
        with pytest.raises(TypeError, match=f"{function.__name__}: key has type .*, {expected}"):
            jax.jit(call)(key)


@pytest.mark.exhaustive
def test_raw_random_keys(ovis):
    """Keys of the older kind, `jax.random.PRNGKey`, give the same tokens."""
    options = dict(max_new_tokens=8, sampling=ovis_jax.Sampling(3.0), eos_ids=())
    inputs = ovis.processor("Hi")
    new, old = (
        ovis_jax.generate(ovis.model, ovis.params, inputs, key, **options).tokens.tolist()
        for key in (jax.random.key(5), jax.random.PRNGKey(5))
    )
    assert new == old


def test_mesh_and_rules():
    with pytest.raises(TypeError, match=r"load: mesh has type str, expected a jax\.sharding\.Mesh"):
        ovis_jax.load("ovis-tiny", mesh="model")  # pyright: ignore
    with pytest.raises(TypeError, match="load: rules has type list, expected a dict from letters"):
        ovis_jax.load("ovis-tiny", rules=["model"])  # pyright: ignore


def test_other_arguments(ovis, tmp_path):
    with pytest.raises(TypeError, match="encode_answers: processor has type list, expected a Proc"):
        ovis_jax.encode_answers([["A"]], ovis.processor)  # pyright: ignore
    with pytest.raises(TypeError, match="save_params: params has type OvisConfig, expected a dict"):
        ovis_jax.save_params(tmp_path / "a", ovis.config, ovis.params)  # pyright: ignore
    with pytest.raises(TypeError, match="nearest_tokens: params has type .*, expected a dict"):
        ovis_jax.nearest_tokens(ovis.params["visual_embedding"], ovis.params)  # pyright: ignore


def test_tracers_pass():
    def trace(params):
        check_argument_types("trace", params=(params, dict))
        return params["x"]

    assert jax.jit(trace)({"x": np.ones(2)}).tolist() == [1, 1]
