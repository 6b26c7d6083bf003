"""Exported adapters in PyTorch, loaded with the `peft` library."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measured import record
from peft import PeftModel
from peft.tuners.lora import Linear
from random_adapters import random_adapters
from reference.ovis_torch import OvisTorch, params_of
from transformers import GenerationMixin, PreTrainedModel

from ovis_jax import presets
from ovis_jax.checkpoint.adapters import load_adapters, save_adapters
from ovis_jax.checkpoint.params import save_params
from ovis_jax.config import OvisConfig
from ovis_jax.conversion.peft_export import export_peft_adapter
from ovis_jax.conversion.to_hf import export_to_hf
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model.lora import attach_adapters
from ovis_jax.model.ovis import Ovis, forward
from ovis_jax.sharding import adapter_axes

# What peft 0.21 reads of transformers 5.
pytestmark = [
    pytest.mark.torch,
    pytest.mark.optimized,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

TOLERANCE = 1e-4  # of the largest logit
TIED = presets.tiny()
UNTIED = dataclasses.replace(TIED, decoder=dataclasses.replace(TIED.decoder, tie_embeddings=False))
SCALE = 1.5

RNG = np.random.default_rng(0)
PIXELS = RNG.normal(size=(1, 70, 70, 3)).astype(np.float32)
PREFIX, TEXT = [2, -301], [-302, -305, *RNG.integers(108, 600, 20).tolist()]


class Whole(PreTrainedModel, GenerationMixin):
    """The parts under the names that the original's model gives them."""

    base_model_prefix = "ovis"

    def __init__(self, reference: OvisTorch):
        super().__init__(reference.llm.config)
        parts: Any = reference.model
        self.llm, self.vte = parts["llm"], parts["vte"]
        self.visual_tokenizer = parts["visual_tokenizer"]


def reference_logits(reference: OvisTorch) -> np.ndarray:
    ids = np.array([*PREFIX, -300, *TEXT])
    return reference.forward(ids, PIXELS.transpose(0, 3, 1, 2)).decoder.logits


def our_logits(config: OvisConfig, params) -> np.ndarray:
    tokens = np.array([[*PREFIX, *[-300] * 9, *TEXT]], np.int32)
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    return np.asarray(forward(Ovis(config), params, Inputs(tokens, positions, PIXELS)))[0]


def check(what: str, found: np.ndarray, expected: np.ndarray, plain: np.ndarray) -> None:
    """Equal to rounding, and far from what the model computes without adapters."""
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    record(what, error, TOLERANCE)
    assert error <= TOLERANCE, f"{what}: {error:.2e} of the largest logit"
    assert np.abs(plain - expected).max() / np.abs(expected).max() > 100 * TOLERANCE


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (TIED, ".*"),
        (UNTIED, ".*"),
        (TIED, "decoder/block_[13]/attn/[qv]"),
        (TIED, "vision/block_1/.*|visual_tokenizer/head"),
    ],
    ids=["every matrix", "untied", "some of the decoder", "some of the eye"],
)
def test_same_logits_by_peft_and_merged(tmp_path: Path, config: OvisConfig, targets: str):
    reference = OvisTorch.random(config, seed=5)
    plain, params = reference_logits(reference), params_of(reference, config)
    save_params(tmp_path / "own", params, config)
    save_adapters(tmp_path / "lora", random_adapters(config, targets=targets), config, scale=SCALE)
    adapters = load_adapters(tmp_path / "lora", config)
    expected = our_logits(config, attach_adapters(params, adapters.weights, SCALE))

    export_to_hf(tmp_path / "own", tmp_path / "merged", merge=tmp_path / "lora")
    merged = reference_logits(OvisTorch.from_folder(tmp_path / "merged"))
    check("merged", merged, expected, plain)

    export_peft_adapter(tmp_path / "own", tmp_path / "peft", tmp_path / "lora")
    wrapped = PeftModel.from_pretrained(Whole(reference), tmp_path / "peft")
    adapted = [module for module in wrapped.modules() if isinstance(module, Linear)]
    assert len(adapted) == len(adapters.matrix_paths)
    assert all(module.scaling == {"default": SCALE} for module in adapted)
    if targets == ".*":
        assert len(adapted) == len(adapter_axes(config)) / 2
    check("by peft", reference_logits(reference), expected, plain)
