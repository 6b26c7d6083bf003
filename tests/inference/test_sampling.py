"""Each sampling step, compared with literal tables or the same computation in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tied_logits import count_kept, tied_logits

from ovis_jax.errors import RequestError
from ovis_jax.inference.sampling import (
    Sampling,
    apply_penalties,
    apply_repetition_penalty,
    sample,
    top_k_top_p,
)

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


@pytest.mark.slow
@pytest.mark.parametrize(
    "row, p, expected",
    [
        ([0.0] * 600, 0.001, [0]),
        ([0.0] * 10, 0.3, [0, 1, 2]),
        ([3.0, 3.0, 0.0], 0.4, [0]),
        ([3.0, 3.0, 0.0], 0.5, [0, 1]),
        ([-1.0, 2.0, 5.0, 2.0, 5.0, 2.0], 0.95, [1, 2, 4]),
        ([0.0, -0.0, 0.0, -0.0], 0.5, [0, 1]),
        ([1.0, 2.0, 2.0], 1e-8, [1]),
        ([-80.0, -120.0, -120.0, -90.0], 0.999, [0]),
    ],
)
def test_top_p_keeps_the_lowest_ids_of_ties(row, p, expected):
    logits = jnp.array([row])
    assert np.flatnonzero(kept(top_k_top_p(logits, p=p))[0]).tolist() == expected
    keys = jax.random.split(jax.random.key(0), 100)
    sampling = Sampling(temperature=1.0, top_p=p)
    tokens = jax.vmap(lambda key: sample(logits, sampling, None, key))(keys)
    assert set(np.asarray(tokens)[:, 0].tolist()) <= set(expected)


def test_top_p_keeps_as_many_tokens_as_transformers():
    """With ties, for 1,000 rows; test_parity.py compares the same rows with transformers itself."""
    logits, top_p = tied_logits()
    found = kept(jax.jit(lambda logits, p: top_k_top_p(logits, p=p))(logits, top_p))
    expected = [count_kept(x, p) for x, p in zip(logits, top_p.tolist(), strict=True)]
    assert np.sum(found, axis=-1).tolist() == expected


@pytest.mark.optimized
@pytest.mark.parametrize("p", [0.5, 0.99, 0.99999, 0.9999999])
def test_top_p_of_a_large_vocabulary(p):
    """The probabilities of most tokens are below the rounding error of 1 in float32."""
    row = np.random.default_rng(0).normal(0, 8, 256_000).astype(np.float32)
    expected = {0.5: 1, 0.99: 21, 0.99999: 1814, 0.9999999: 11407}[p]
    converted = Sampling(temperature=1.0, top_p=p).as_arrays().top_p  # as in generate and serve
    for value in (p, converted):
        found = np.isfinite(top_k_top_p(jnp.array(row[None]), p=value)).sum()
        assert found == expected == count_kept(row, p)


@pytest.mark.slow
def test_top_p_1_changes_nothing():
    """Neither alone nor next to a row with another p, also for logits with the probability 0."""
    logits = jnp.array([[0.0, -300.0, -jnp.inf, 5.0]] * 2)
    assert top_k_top_p(logits, p=1.0).tolist() == logits.tolist()
    assert kept(top_k_top_p(logits, p=jnp.array([1.0, 0.9]))) == [[1, 1, 0, 1], [0, 0, 0, 1]]
    assert kept(top_k_top_p(logits, jnp.array([3, 2]), 1.0)) == [[1, 1, 0, 1], [1, 0, 0, 1]]


def test_the_repetition_penalty_depends_on_the_sign():
    logits, seen = jnp.array([[2.0, -2.0, 2.0, -2.0]]), jnp.array([[True, True, False, False]])
    assert apply_repetition_penalty(logits, seen, jnp.array([[2.0]])).tolist() == [
        [1.0, -4.0, 2.0, -2.0]
    ]


def test_frequency_and_presence_penalties():
    """The frequency penalty counts each time, the presence penalty once; both may be negative."""
    logits = jnp.array([[4.0, 4.0, 4.0], [-1.0, 2.0, 0.0]])
    counts = jnp.array([[0, 1, 3], [2, 0, 1]])
    penalties = Sampling(frequency_penalty=0.5, presence_penalty=jnp.array([1.0, -2.0]))
    found = apply_penalties(logits, counts, penalties)
    assert found.tolist() == [[4.0, 2.5, 1.5], [0.0, 2.0, 1.5]]
    # The repetition penalty comes first, because it depends on the sign.
    penalties = Sampling(repetition_penalty=2.0, presence_penalty=3.0)
    assert apply_penalties(logits, counts, penalties).tolist()[0] == [4.0, -1.0, -1.0]
    assert sample(logits, penalties, counts).tolist() == [0, 1]


@pytest.mark.parametrize(
    "p, expected",
    [
        (0.0, {0, 1, 2, 3, 4}),
        (0.15, {0, 1, 2, 3}),
        (0.35, {0, 1}),
        (0.45, {0}),
        (1.0, {0}),
    ],
)
def test_min_p_is_a_fraction_of_the_highest_probability(p, expected):
    """Which is 0.5, before 0.2, 0.15, 0.1 and 0.05."""
    keys = jax.random.split(jax.random.key(0), 400)
    sampling = Sampling(temperature=1.0, min_p=p)
    tokens = jax.vmap(lambda key: sample(LOGITS, sampling, None, key))(keys)
    assert set(np.asarray(tokens)[:, 0].tolist()) == expected


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
    counts = jnp.zeros((2, 5), jnp.int32).at[0, 0].set(3)
    logits = LOGITS + 5.0
    sampling = Sampling(temperature=1.0, top_k=1, repetition_penalty=2.0)
    tokens = [int(sample(logits, sampling, counts, jax.random.key(i))[0]) for i in range(10)]
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
        (Sampling(top_p=0.5), "top_k, top_p and min_p need a temperature"),
        (Sampling(min_p=0.5), "top_k, top_p and min_p need a temperature"),
        (Sampling(temperature=1.0, min_p=1.5), "min_p is 1.5, expected from 0 to 1"),
        (Sampling(frequency_penalty=float("nan")), "frequency_penalty is nan, expected a finite"),
        (Sampling(presence_penalty=float("inf")), "presence_penalty is inf, expected a finite"),
    ],
)
def test_values_out_of_range(sampling, message):
    with pytest.raises(RequestError, match=message):
        sampling.check()


def test_sampling_needs_a_key():
    with pytest.raises(RequestError, match="needs a key"):
        sample(LOGITS, Sampling(temperature=1.0))
