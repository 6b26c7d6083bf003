"""Each sampling step, compared with literal tables or the same computation in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovis_jax.errors import RequestError
from ovis_jax.inference.sampling import Sampling, apply_repetition_penalty, sample, top_k_top_p

LOGITS = jnp.log(jnp.array([[0.5, 0.2, 0.15, 0.1, 0.05], [0.05, 0.1, 0.15, 0.2, 0.5]]))


def kept(logits):
    return np.isfinite(np.asarray(logits)).astype(int).tolist()


@pytest.mark.parametrize(
    "k, expected",
    [
        (1, [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]),
        (3, [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]),
        (9, [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
        (jnp.array([2, 4]), [[1, 1, 0, 0, 0], [0, 1, 1, 1, 1]]),
    ],
)
def test_top_k(k, expected):
    assert kept(top_k_top_p(LOGITS, k)) == expected


@pytest.mark.parametrize(
    "p, expected",
    [
        (0.4, [1, 0, 0, 0, 0]),
        (0.6, [1, 1, 0, 0, 0]),
        (0.75, [1, 1, 1, 0, 0]),
        (1.0, [1, 1, 1, 1, 1]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_p(p, expected):
    found = kept(top_k_top_p(LOGITS, p=p))
    assert found == [expected, expected[::-1]]


@pytest.mark.parametrize("p, expected", [(0.55, [1, 0, 0, 0, 0]), (0.65, [1, 1, 0, 0, 0])])
def test_top_p_is_a_share_of_the_top_k(p, expected):
    """The first of 0.5, 0.2 and 0.15 has a share of 0.59."""
    assert kept(top_k_top_p(LOGITS, 3, p)) == [expected, expected[::-1]]


def test_the_repetition_penalty_depends_on_the_sign():
    logits, seen = jnp.array([[2.0, -2.0, 2.0, -2.0]]), jnp.array([[True, True, False, False]])
    assert apply_repetition_penalty(logits, seen, jnp.array([[2.0]])).tolist() == [
        [1.0, -4.0, 2.0, -2.0]
    ]


def test_temperature_none_and_0_are_greedy():
    key = jax.random.key(0)
    assert sample(LOGITS, Sampling()).tolist() == [0, 4]
    assert sample(LOGITS, Sampling(temperature=0.0, top_p=0.9), None, key).tolist() == [0, 4]
    mixed = Sampling(temperature=jnp.array([0.0, 100.0]))
    sampled = {int(sample(LOGITS, mixed, None, jax.random.key(i))[1]) for i in range(40)}
    assert sampled == {0, 1, 2, 3, 4}
    assert all(int(sample(LOGITS, mixed, None, jax.random.key(i))[0]) == 0 for i in range(40))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies(temperature):
    keys = jax.random.split(jax.random.key(1), 20000)
    sampling = Sampling(temperature=temperature, top_k=4)
    tokens = np.asarray(jax.vmap(lambda key: sample(LOGITS, sampling, None, key))(keys))
    weights = np.array([0.5, 0.2, 0.15, 0.1, 0.0]) ** (1 / temperature)
    expected = weights / weights.sum()
    found = np.bincount(tokens[:, 0], minlength=5) / len(keys)
    np.testing.assert_allclose(found, expected, atol=0.015)  # 4 standard deviations
    assert found[4] == 0


def test_order_is_penalty_temperature_top_k_top_p():
    """After the penalty, token 1 is more likely than token 0, so top-k keeps only token 1."""
    seen = jnp.zeros((2, 5), bool).at[0, 0].set(True)
    logits = LOGITS + 5.0
    sampling = Sampling(temperature=1.0, top_k=1, repetition_penalty=2.0)
    tokens = [int(sample(logits, sampling, seen, jax.random.key(i))[0]) for i in range(10)]
    assert tokens == [1] * 10


@pytest.mark.parametrize(
    "sampling, message",
    [
        (Sampling(temperature=-1.0), "temperature is -1.0, expected at least 0"),
        (Sampling(temperature=float("nan")), "temperature is nan"),
        (Sampling(temperature=1.0, top_k=0), "top_k is 0, expected a whole number from 1 to 2147"),
        (Sampling(temperature=1.0, top_k=2.5), "top_k is 2.5, expected a whole number from 1"),
        (Sampling(temperature=1.0, top_k=2**31), "top_k is 2147483648, expected a whole number"),
        (Sampling(temperature=1.0, top_p=0.0), "top_p is 0.0, expected above 0"),
        (Sampling(temperature=1.0, top_p=1.5), "top_p is 1.5"),
        (Sampling(repetition_penalty=0.0), "repetition_penalty is 0.0, expected above 0"),
        (Sampling(top_p=0.5), "top_k and top_p need a temperature"),
    ],
)
def test_values_out_of_range(sampling, message):
    with pytest.raises(RequestError, match=message):
        sampling.check()


def test_sampling_needs_a_key():
    with pytest.raises(RequestError, match="needs a key"):
        sample(LOGITS, Sampling(temperature=1.0))
