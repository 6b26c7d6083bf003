"""Losses compared with sums in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ovis_jax.inference import label_logits
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model import visual_tokenizer
from ovis_jax.model.decoder import unembed
from ovis_jax.training.config import StepConfig
from ovis_jax.training.losses import (
    PreferenceBatch,
    TrainBatch,
    answer_log_probs,
    cross_entropy_sum_and_count,
    dpo_losses,
)
from ovis_jax.training.train_step import (
    init_train_state,
    reference_log_probs,
    stack_micro_batches,
    train_step,
)
from ovis_jax.training.trainable import TRAINABLE_PARTS, split_params

LABELS = np.array([[-100, -100, 4, 2, -100], [3, -100, -100, -100, 6]], np.int32)


def random_hidden_states(width: int):
    return jnp.array(np.random.default_rng(0).normal(size=(2, 5, width)), jnp.float32)


def logits_of(model, params, hidden):
    return unembed(model.config.decoder, hidden, *model.unembed_weights(params))


def expected_log_probs(logits, labels):
    """Return (row, log-probability) of every label but those at position 0."""
    found = []
    for b, row in enumerate(labels):
        for t in range(1, len(row)):
            if row[t] != -100:
                z = np.asarray(logits[b, t - 1], np.float64)
                found.append((b, z[row[t]] - np.log(np.exp(z).sum())))
    return found


def test_cross_entropy_loss(shallow):
    model, params = shallow
    hidden = random_hidden_states(model.config.decoder.width)
    expected = expected_log_probs(logits_of(model, params, hidden), LABELS)
    total, count = cross_entropy_sum_and_count(model, params, hidden, jnp.array(LABELS))
    assert count == len(expected) == 3
    np.testing.assert_allclose(total, -sum(x for _, x in expected), rtol=1e-6)


def test_answer_log_probs(shallow):
    model, params = shallow
    hidden = random_hidden_states(model.config.decoder.width)
    log_probs = expected_log_probs(logits_of(model, params, hidden), LABELS)
    expected = [sum(x for b, x in log_probs if b == row) for row in (0, 1)]
    found = answer_log_probs(model, params, hidden, jnp.array(LABELS))
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


def image_batch(seed: int) -> TrainBatch:
    """Two rows with an image each, and four and nine answer tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(108, 600, (2, 24)).astype(np.int32)
    tokens[:, 1:10] = -300
    positions = np.tile(np.arange(24, dtype=np.int32), (2, 1))
    pixels = np.random.default_rng(0).normal(size=(2, 70, 70, 3)).astype(np.float32)
    has_label = np.arange(24) >= np.array([[20], [15]])
    return TrainBatch(Inputs(tokens, positions, pixels), jnp.where(has_label, tokens, -100))


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_chunks_give_the_same_gradients(shallow, monkeypatch, objective):
    """The first moment of AdamW after one step is a multiple of the gradient."""
    model, params = shallow
    config = StepConfig(max_steps=10, max_grad_norm=1e9)
    trainable, frozen = split_params(params, list(TRAINABLE_PARTS))
    batch = image_batch(1)
    if objective == "dpo":
        batch = PreferenceBatch(batch, image_batch(2), jnp.zeros(2), jnp.zeros(2))
    batches = stack_micro_batches([batch])

    def run():
        jax.clear_caches()
        given = batches
        if isinstance(given, PreferenceBatch):
            parts = (given.chosen, given.rejected)
            chosen, rejected = (reference_log_probs(model, params, part) for part in parts)
            given = given._replace(reference_chosen=chosen, reference_rejected=rejected)
        state = init_train_state(config, trainable)
        state, metrics = train_step(model, config, state, frozen, given)
        moments = flatten_dict(state.opt_state[1][0].mu, sep="/")
        return metrics, {path: np.asarray(x) for path, x in moments.items()}

    expected_metrics, expected = run()
    monkeypatch.setattr(label_logits, "LOGITS_PER_CHUNK", 2 * 3 * model.config.decoder.vocab_size)
    monkeypatch.setattr(visual_tokenizer, "VISUAL_TOKENS_PER_CHUNK", 6)
    metrics, found = run()
    np.testing.assert_allclose(metrics.loss, expected_metrics.loss, rtol=1e-5)
    assert found.keys() == expected.keys() == trainable.keys()
    largest: dict[str, float] = {}
    for path, x in expected.items():
        module = path.rpartition("/")[0]  # the gradients of key biases are zero but for rounding
        largest[module] = max(largest.get(module, 0.0), float(np.abs(x).max()))
    for path, x in expected.items():
        scale = largest[path.rpartition("/")[0]]
        assert scale > 0 and np.abs(found[path] - x).max() <= 1e-5 * scale, path
