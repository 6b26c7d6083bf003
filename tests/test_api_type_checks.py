"""Swapped or mistyped arguments of public functions raise a TypeError that names them."""

from functools import partial

import jax
import jaxtyping
import numpy as np
import pytest

import ovis_jax
from ovis_jax.api_type_checks import check_argument_types


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
    with pytest.raises(TypeError, match=f"{name}: model is a dict, expected an Ovis"):
        call(ovis.params, ovis.model, inputs)
    with pytest.raises(TypeError, match=f"{name}: model is a LoadedOvis, expected an Ovis"):
        call(ovis, ovis.params, inputs)
    with pytest.raises(TypeError, match=f"{name}: params is a Ovis, expected a dict"):
        call(ovis.model, ovis.model, inputs)
    if name != "warmup":
        with pytest.raises(TypeError, match=f"{name}: inputs is a str, expected Inputs"):
            call(ovis.model, ovis.params, "What is there?")


@pytest.mark.parametrize("function", [ovis_jax.generate, ovis_jax.stream, ovis_jax.warmup])
def test_generation_options(ovis, function):
    inputs = [(1, 64, 1)] if function is ovis_jax.warmup else ovis.processor("Hi")
    name, call = function.__name__, partial(function, ovis.model, ovis.params, inputs)
    with pytest.raises(TypeError, match=f"{name}: max_new_tokens is a str, expected an int"):
        call(max_new_tokens="8")
    with pytest.raises(TypeError, match=f"{name}: sampling is a float, expected a Sampling"):
        call(max_new_tokens=8, sampling=0.7)


def test_other_arguments(ovis, tmp_path):
    with pytest.raises(TypeError, match="encode_answers: processor is a list, expected a Proc"):
        ovis_jax.encode_answers([["A"]], ovis.processor)  # pyright: ignore
    with pytest.raises(TypeError, match="save_params: params is a OvisConfig, expected a dict"):
        ovis_jax.save_params(tmp_path / "a", ovis.config, ovis.params)  # pyright: ignore
    with pytest.raises(TypeError, match="nearest_tokens: params is a .*, expected a dict"):
        ovis_jax.nearest_tokens(ovis.params["visual_embedding"], ovis.params)  # pyright: ignore


def test_tracers_pass():
    def trace(params):
        check_argument_types("trace", params=(params, dict))
        return params["x"]

    assert jax.jit(trace)({"x": np.ones(2)}).tolist() == [1, 1]
