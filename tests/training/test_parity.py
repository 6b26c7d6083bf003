"""Gradients against PyTorch: the same loss on the same batch, for every parameter."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from measured import record
from reference.ovis_torch import Float64, OvisTorch, params_of

from ovis_jax import presets
from ovis_jax.checkpoint.key_map import make_hub_key_map
from ovis_jax.config import OvisConfig
from ovis_jax.inference import label_logits
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model import visual_tokenizer
from ovis_jax.model.ovis import Ovis
from ovis_jax.model.visual_tokenizer import VisualTokenizer, embed_words
from ovis_jax.training.losses import (
    TrainBatch,
    answer_log_probs,
    cross_entropy_sum_and_count,
    dpo_losses,
)

pytestmark = [pytest.mark.torch, pytest.mark.optimized]

TOLERANCE = 1e-4
BETA, REFERENCE_CHOSEN, REFERENCE_REJECTED = 0.1, -44.0, -46.0


def conversations(config: OvisConfig) -> TrainBatch:
    """Two rows with two images each, and seven and nine answer tokens."""
    rng = np.random.default_rng(0)
    image = [-301, *[-300] * 9, -302, -305]
    ids = rng.integers(108, config.decoder.vocab_size, (2, 21))
    tokens = np.array([[2, *image, *row[:12], *image, *row[12:]] for row in ids], np.int32)
    T = tokens.shape[1]
    labels: Any = np.where(np.arange(T) >= T - np.array([[7], [9]]), tokens, -100)
    positions = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    pixels = rng.normal(size=(4, 70, 70, 3)).astype(np.float32)
    return TrainBatch(Inputs(tokens, positions, pixels), labels)


def our_loss(model, objective, batch, params):
    hidden = model.last_hidden_states(params, batch.inputs)
    labels = jnp.asarray(batch.labels)
    if objective == "sft":
        total, count = cross_entropy_sum_and_count(model, params, hidden, labels)
        return total / count
    chosen, rejected = answer_log_probs(model, params, hidden, labels)
    references = jnp.array([REFERENCE_CHOSEN]), jnp.array([REFERENCE_REJECTED])
    return dpo_losses(chosen[None], rejected[None], *references, beta=BETA)[0]


def torch_loss(reference, objective, batch):
    tokens, labels = batch.inputs.tokens, batch.labels
    pixels = batch.inputs.pixels.transpose(0, 3, 1, 2).astype(np.float64)
    if objective == "sft":
        return reference.loss(tokens, labels, pixels)
    chosen, rejected = (
        -reference.loss(tokens[[b]], labels[[b]], pixels[2 * b : 2 * b + 2])
        * (labels[b] >= 0).sum()
        for b in (0, 1)
    )
    margin = BETA * ((chosen - REFERENCE_CHOSEN) - (rejected - REFERENCE_REJECTED))
    return -torch.nn.functional.logsigmoid(margin)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, objective, sharpness, remat, in_chunks, tolerance",
    [
        (presets.tiny(), "sft", 1.0, False, True, 1e-5),
        (presets.tiny(), "dpo", 1.0, False, True, 1e-5),
        (presets.tiny(), "sft", 2.5, False, True, TOLERANCE),
        pytest.param(presets.tiny(), "sft", 1.0, True, False, 1e-5, marks=pytest.mark.exhaustive),
        (presets.tiny_llama(), "sft", 1.0, False, False, 1e-5),
    ],
    ids=["sft", "dpo", "sharp", "remat", "llama"],
)
def test_gradients(config, objective, sharpness, remat, in_chunks, tolerance, monkeypatch):
    """Ours in float32, PyTorch's in float64, so that all of the difference is ours.

    The measure is the norm of a parameter's difference, relative to the norm of its gradient. For
    SigLIP's key biases it is the gradient of the query biases: theirs is zero but for rounding,
    since a softmax does not see them.

    Sharp attention amplifies rounding: PyTorch's own float32 then differs from its float64 more
    than ours does.
    """
    reference = OvisTorch.random(config, seed=4, sharpness=sharpness)
    if in_chunks:
        monkeypatch.setattr(label_logits, "LOGITS_PER_CHUNK", 2 * 4 * config.decoder.vocab_size)
        monkeypatch.setattr(visual_tokenizer, "VISUAL_TOKENS_PER_CHUNK", 6)
    params, batch = params_of(reference, config), conversations(config)
    loss = partial(our_loss, Ovis(config, remat=remat), objective, batch)
    value, tree = jax.jit(jax.value_and_grad(loss))(params)
    found = {path: np.asarray(x) for path, x in flatten_dict(tree, sep="/").items()}
    with Float64():
        reference.model.double()
        expected_value, by_key = reference.gradients(
            partial(torch_loss, reference, objective, batch)
        )
    expected = {path: by_key[key] for key, path in make_hub_key_map(config).parameters.items()}
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(value, expected_value, rtol=tolerance)
    for path, gradient in expected.items():
        assert gradient.dtype == np.float64
        scale = np.linalg.norm(expected[path.replace("k_bias", "q_bias")])
        error = float(np.linalg.norm(found[path] - gradient) / scale)
        record(f"{path.partition('/')[0]}, sharpness {sharpness}", error, tolerance)
        assert scale > 0 and error <= tolerance, f"{path}: {error:.2e} of the gradient"


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("function", ["st_argmax", "gumbel_argmax"])
def test_straight_through_gradients(function, tau, monkeypatch):
    """Hard visual tokens and their gradients, with the same noise as in PyTorch."""
    config = presets.tiny()
    reference = OvisTorch.random(config, seed=5)
    params = params_of(reference, config)
    tokenizer = replace(config.visual_tokenizer, tokenize_function=function, tau=tau)
    merged = np.random.default_rng(1).normal(size=(2, 9, 192)).astype(np.float32)
    weights = np.random.default_rng(2).normal(size=(2, 9, 64)).astype(np.float32)
    key = jax.random.key(7)

    def loss(params, merged):
        module = VisualTokenizer(tokenizer)
        tokens = module.apply({"params": params["visual_tokenizer"]}, merged, key)
        return (embed_words(tokens.probabilities, params["visual_embedding"]) * weights).sum()

    value, (found, found_merged) = jax.value_and_grad(loss, (0, 1))(params, merged)

    noise = torch.tensor(np.asarray(jax.random.gumbel(key, (2, 9, tokenizer.num_words))))
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x: x.copy_(torch.exp(-noise)))
    reference.model.requires_grad_(True)
    features = torch.tensor(merged, requires_grad=True)
    logits = reference.head(features)
    if function == "gumbel_argmax":
        tokens = torch.nn.functional.gumbel_softmax(logits, tau=tau, hard=True)
    else:  # the original's st_argmax
        index = logits.max(-1, keepdim=True)[1]
        tokens = torch.zeros_like(logits).scatter_(-1, index, 1.0) - logits.detach() + logits
    table = reference.table.weight
    expected_value = (tokens @ table[: tokenizer.num_words] * torch.tensor(weights)).sum()
    expected_value.backward()

    linear, norm = reference.head
    pairs = {
        "head": (found["visual_tokenizer"]["head"], linear.weight.grad),
        "norm weight": (found["visual_tokenizer"]["norm"]["scale"], norm.weight.grad),
        "norm bias": (found["visual_tokenizer"]["norm"]["bias"], norm.bias.grad),
        "table": (found["visual_embedding"], table.grad),
        "features": (found_merged, features.grad),
    }
    np.testing.assert_allclose(value, expected_value.item(), rtol=TOLERANCE)
    for name, (gradient, expected) in pairs.items():
        scale = float(expected.abs().max())
        error = float(np.abs(gradient - expected.numpy()).max()) / scale
        record(name, error, TOLERANCE)
        assert scale > 0 and error <= TOLERANCE, f"{name}: {error:.2e} of the largest gradient"
