"""The PyTorch reference against the golden files of the original code.

The reference is bit-identical on the processor that computed the files. Other processors order sums
differently, and the sharp weights amplify the difference.
"""

from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from reference.ovis_torch import OvisTorch, params_of

from ovis_jax import presets
from ovis_jax.checkpoint.key_map import make_hub_key_map, unused_tensor_shapes
from ovis_jax.checkpoint.params import load_params
from ovis_jax.config import OvisConfig

pytestmark = [pytest.mark.torch, pytest.mark.optimized]

GOLDEN = Path(__file__).parents[1] / "golden"
FLOAT32 = ["wide", "tall", "square", "tiny", "tall_thin", "large", "large_mp4", "large_mp1"]
FLOAT32 += ["rgba", "palette", "two_images", "text_only", "multi_turn"]
CASES = [("tiny-f32", name, f"{name}.npz") for name in FLOAT32] + [
    ("tiny-bf16-sharded", name, f"{name}.f32.npz") for name in ("square", "text_only", "multi_turn")
]
VISUAL_TOLERANCE = 1e-5  # of the largest value
DECODER_TOLERANCE = 1e-2  # absolute; the smallest mistake in golden/README.md makes 0.015


@cache
def reference(checkpoint: str) -> OvisTorch:
    return OvisTorch.from_folder(GOLDEN / checkpoint)


def check_visual(what: str, got: np.ndarray, expected: np.ndarray) -> None:
    check(what, got, expected, VISUAL_TOLERANCE * np.abs(expected).max())


def check(what: str, got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert got.shape == expected.shape
    error = np.abs(got - expected).max()
    assert error <= tolerance, f"{what}: error {error:.2e}, tolerance {tolerance:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize(("checkpoint", "case", "file"), CASES, ids=lambda value: str(value))
def test_golden_case(checkpoint: str, case: str, file: str):
    expected = np.load(GOLDEN / "cases" / checkpoint / file)
    # The bfloat16 cases have the pixels of the float32 cases and do not store them.
    source = np.load(GOLDEN / "cases" / "tiny-f32" / f"{case}.npz")
    pixels = source.get("pixel_values")
    assert (pixels is None) == (case == "text_only")
    model, ids = reference(checkpoint), expected["input_ids"]
    states = model.forward(ids, pixels)
    if states.images is not None:
        images = states.images
        check_visual("features", images.features, expected["visual_features"])
        check_visual("visual logits", images.logits, expected["visual_logits"])
        check_visual("embeddings", images.embeddings, expected["visual_embeds"])
        best = np.take_along_axis(images.probabilities, expected["visual_top8_ids"], -1)
        check_visual("probabilities", best, expected["visual_top8_probs"])
        if "siglip_hidden" in expected:
            check_visual("vision", images.vision, expected["siglip_hidden"])
    check_visual("inputs_embeds", states.inputs_embeds, expected["inputs_embeds"])
    check("blocks", states.decoder.blocks, expected["llm_blocks"], DECODER_TOLERANCE)
    check("logits", states.decoder.logits, expected["logits"], DECODER_TOLERANCE)
    greedy = model.generate(ids, pixels, len(expected["gen_tokens"]))
    np.testing.assert_array_equal(greedy.tokens, expected["gen_tokens"])
    np.testing.assert_allclose(greedy.margins, expected["gen_margins"], atol=DECODER_TOLERANCE)


def test_state_dict_has_the_keys_of_the_hub():
    config = presets.tiny()
    state = OvisTorch.random(config, seed=0).state_dict()
    keys = make_hub_key_map(config)
    assert state.keys() == keys.parameters.keys() | keys.unused.keys()
    assert {key: state[key].shape for key in keys.unused} == unused_tensor_shapes(config)


def test_random_weights_depend_on_the_seed():
    first, again, other = (
        OvisTorch.random(presets.tiny(), seed=seed).state_dict() for seed in (0, 0, 1)
    )
    for key, tensor in first.items():
        np.testing.assert_array_equal(tensor, again[key], err_msg=key)
        assert np.all(tensor != other[key]), key
        assert np.std(tensor) > 0.02, key


def test_saved_hub_folder_holds_the_same_model(tmp_path: Path):
    config = presets.tiny()
    model = OvisTorch.random(config, seed=0)
    model.save_hub_folder(tmp_path / "hub", config)
    assert OvisConfig.from_folder(tmp_path / "hub") == config
    jax.tree.map(
        np.testing.assert_array_equal,
        load_params(tmp_path / "hub", config),
        params_of(model, config),
    )
    again = OvisTorch.from_folder(tmp_path / "hub").state_dict()
    jax.tree.map(np.testing.assert_array_equal, again, model.state_dict())
