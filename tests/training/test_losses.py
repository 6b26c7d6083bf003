"""Losses compared with sums in numpy."""

import jax.numpy as jnp
import numpy as np

from ovis_jax.training.losses import answer_log_probs, cross_entropy_sum_and_count, dpo_losses


def random_logits_and_labels():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 7)).astype(np.float32) * 3
    labels = np.array([[-100, -100, 4, 2, -100], [3, -100, -100, -100, 6]], np.int32)
    return logits, labels


def expected_log_probs(logits, labels):
    """Return (row, log-probability) of every label but those at position 0."""
    found = []
    for b, row in enumerate(labels):
        for t in range(1, len(row)):
            if row[t] != -100:
                z = logits[b, t - 1].astype(np.float64)
                found.append((b, z[row[t]] - np.log(np.exp(z).sum())))
    return found


def test_cross_entropy_loss():
    logits, labels = random_logits_and_labels()
    expected = expected_log_probs(logits, labels)
    total, count = cross_entropy_sum_and_count(jnp.array(logits), jnp.array(labels))
    assert count == len(expected) == 3
    np.testing.assert_allclose(total, -sum(x for _, x in expected), rtol=1e-6)


def test_answer_log_probs():
    logits, labels = random_logits_and_labels()
    log_probs = expected_log_probs(logits, labels)
    expected = [sum(x for b, x in log_probs if b == row) for row in (0, 1)]
    found = answer_log_probs(jnp.array(logits), jnp.array(labels))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_dpo_loss():
    arguments = [np.array(x) for x in ([-1.0, -5.0], [-3.0, -2.0], [-2.0, -4.0], [-2.5, -2.5])]
    margin = 0.5 * ((arguments[0] - arguments[2]) - (arguments[1] - arguments[3]))
    right, swapped = -np.log1p(np.exp(-margin)), -np.log1p(np.exp(margin))
    values = [jnp.array(x, jnp.float32) for x in arguments]
    for smoothing in (0.0, 0.1):
        expected = -(1 - smoothing) * right - smoothing * swapped
        found = dpo_losses(*values, beta=0.5, label_smoothing=smoothing)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    equal = dpo_losses(*values[:2], *values[:2], beta=0.5)
    np.testing.assert_allclose(equal, np.log(2.0), rtol=1e-6)
