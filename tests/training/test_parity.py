"""Gradients against PyTorch: the same loss on the same batch, for every parameter."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from measured import record
from reference.ovis_torch import OvisTorch, params_of

from ovis_jax import presets
from ovis_jax.checkpoint.key_map import make_hub_key_map
from ovis_jax.inference import label_logits
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model import visual_tokenizer
from ovis_jax.model.ovis import Ovis
from ovis_jax.model.visual_tokenizer import VisualTokenizer, embed_words
from ovis_jax.training.losses import cross_entropy_sum_and_count

pytestmark = [pytest.mark.torch, pytest.mark.optimized]

TOLERANCE = 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, remat, in_chunks",
    [
        (presets.tiny(), False, True),
        pytest.param(presets.tiny(), True, False, marks=pytest.mark.exhaustive),
        (presets.tiny_llama(), False, False),
    ],
    ids=["chunks", "remat", "llama"],
)
def test_gradients(config, remat, in_chunks, monkeypatch):
    """Relative to the largest gradient of the module that a parameter is in.

    (The gradient of SigLIP's key biases is zero but for rounding, since a softmax does not see
    them, so relative to itself it would be noise.)
    """
    # Without Gemma's soft cap, sharp attention amplifies rounding: the gradients of PyTorch in
    # float32 then differ from its own in float64 by 2e-4, as ours do.
    sharpness = 2.5 if config.decoder.attn_softcap else 1.0
    reference = OvisTorch.random(config, seed=3, sharpness=sharpness)
    if in_chunks:
        monkeypatch.setattr(label_logits, "LOGITS_PER_CHUNK", 4 * config.decoder.vocab_size)
        monkeypatch.setattr(visual_tokenizer, "VISUAL_TOKENS_PER_CHUNK", 6)
    params, model = params_of(reference, config), Ovis(config, remat=remat)
    rng = np.random.default_rng(0)
    image = [-301, *[-300] * 9, -302, -305]
    ids = rng.integers(108, config.decoder.vocab_size, 21)
    row = [2, *image, *ids[:12], *image, *ids[12:]]
    tokens = np.array([row], np.int32)
    labels = np.where(np.arange(len(row)) >= len(row) - 7, tokens, -100)
    positions = np.arange(len(row), dtype=np.int32)[None]
    pixels = rng.normal(size=(2, 70, 70, 3)).astype(np.float32)

    def loss(params):
        hidden = model.last_hidden_states(params, Inputs(tokens, positions, pixels))
        total, count = cross_entropy_sum_and_count(model, params, hidden, jax.numpy.asarray(labels))
        return total / count

    value, tree = jax.jit(jax.value_and_grad(loss))(params)
    found = {path: np.asarray(x) for path, x in flatten_dict(tree, sep="/").items()}
    expected_value, by_key = reference.gradients(tokens[0], labels[0], pixels.transpose(0, 3, 1, 2))
    expected = {path: by_key[key] for key, path in make_hub_key_map(config).parameters.items()}
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(value, expected_value, rtol=TOLERANCE)
    largest: dict[str, float] = {}
    for path, gradient in expected.items():
        module = path.rpartition("/")[0]
        largest[module] = max(largest.get(module, 0.0), float(np.abs(gradient).max()))
    for path, gradient in expected.items():
        scale = largest[path.rpartition("/")[0]]
        error = float(np.abs(found[path] - gradient).max()) / scale
        record(path.partition("/")[0], error, TOLERANCE)
        assert scale > 0 and error <= TOLERANCE, f"{path}: {error:.2e} of the largest gradient"


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
