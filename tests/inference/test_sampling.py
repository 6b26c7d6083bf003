"""Each sampling step against a literal table or the same computation in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovis_jax.errors import RequestError
from ovis_jax.inference.sampling import Sampling, keep_likeliest, penalise, pick

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
    assert kept(keep_likeliest(LOGITS, k)) == expected


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
    found = kept(keep_likeliest(LOGITS, p=p))
    assert found == [expected, expected[::-1]]


@pytest.mark.parametrize("p, expected", [(0.55, [1, 0, 0, 0, 0]), (0.65, [1, 1, 0, 0, 0])])
def test_top_p_is_a_share_of_what_top_k_leaves(p, expected):
    """Of 0.5, 0.2 and 0.15 the first is 0.59."""
    assert kept(keep_likeliest(LOGITS, 3, p)) == [expected, expected[::-1]]


def test_repetition_penalty_goes_by_the_sign():
    logits, seen = jnp.array([[2.0, -2.0, 2.0, -2.0]]), jnp.array([[True, True, False, False]])
    assert penalise(logits, seen, jnp.array([[2.0]])).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_greedy_by_none_and_by_zero():
    key = jax.random.key(0)
    assert pick(LOGITS, Sampling()).tolist() == [0, 4]
    assert pick(LOGITS, Sampling(temperature=0.0, top_p=0.9), None, key).tolist() == [0, 4]
    mixed = Sampling(temperature=jnp.array([0.0, 100.0]))
    drawn = {int(pick(LOGITS, mixed, None, jax.random.key(i))[1]) for i in range(40)}
    assert drawn == {0, 1, 2, 3, 4}
    assert all(int(pick(LOGITS, mixed, None, jax.random.key(i))[0]) == 0 for i in range(40))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_drawn_frequencies(temperature):
    keys = jax.random.split(jax.random.key(1), 20000)
    sampling = Sampling(temperature=temperature, top_k=4)
    tokens = np.asarray(jax.vmap(lambda key: pick(LOGITS, sampling, None, key))(keys))
    weights = np.array([0.5, 0.2, 0.15, 0.1, 0.0]) ** (1 / temperature)
    expected = weights / weights.sum()
    found = np.bincount(tokens[:, 0], minlength=5) / len(keys)
    np.testing.assert_allclose(found, expected, atol=0.015)  # 4 standard deviations
    assert found[4] == 0


def test_order_is_penalty_temperature_top_k_top_p():
    """After the penalty token 0 is behind token 1, so that top-k keeps 1 alone."""
    seen = jnp.zeros((2, 5), bool).at[0, 0].set(True)
    logits = LOGITS + 5.0
    sampling = Sampling(temperature=1.0, top_k=1, repetition_penalty=2.0)
    tokens = [int(pick(logits, sampling, seen, jax.random.key(i))[0]) for i in range(10)]
    assert tokens == [1] * 10


@pytest.mark.parametrize(
    "bad, message",
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
def test_values_out_of_range(bad, message):
    with pytest.raises(RequestError, match=message):
        bad.check()


def test_sampling_needs_a_key():
    with pytest.raises(RequestError, match="needs a key"):
        pick(LOGITS, Sampling(temperature=1.0))
