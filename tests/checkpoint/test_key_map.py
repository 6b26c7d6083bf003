import dataclasses
import math
from pathlib import Path

import jax
import pytest
from flax.traverse_util import flatten_dict
from golden_copies import CHECKPOINTS, GOLDEN

from ovis_jax import Ovis, presets
from ovis_jax.checkpoint.checkpoint_problems import CheckpointValidationError
from ovis_jax.checkpoint.key_map import (
    HUB_KEYS,
    LLAMA_HUB_KEYS,
    UNUSED_HUB_KEYS,
    KeyMap,
    make_converted_key_map,
    make_hub_key_map,
    match_tensors,
    unused_tensor_shapes,
)
from ovis_jax.checkpoint.safetensors_reader import TensorInfo
from ovis_jax.checkpoint.tensor_index import TensorIndex, read_tensor_index
from ovis_jax.sharding import PARAM_AXES, param_shapes

CONFIG = presets.tiny()


def make_index(changes=None) -> TensorIndex:
    """The tensors of a valid checkpoint, with some replaced, added, or (None) removed."""
    keys = make_hub_key_map(CONFIG)
    shapes = param_shapes(CONFIG)
    tensors = {key: ("F32", shapes[path]) for key, path in keys.parameters.items()}
    tensors |= {key: ("F32", shape) for key, shape in unused_tensor_shapes(CONFIG).items()}
    tensors |= changes or {}
    entries = tuple(
        TensorInfo(Path("f.safetensors"), key, tensor[0], tensor[1], 0, 0)
        for key, tensor in tensors.items()
        if tensor is not None
    )
    return TensorIndex(Path(), entries, {}, frozenset(), ())


def problems(folder, keys=None, stored_dtype: str | None = "F32"):
    with pytest.raises(CheckpointValidationError) as error:
        match_tensors(folder, CONFIG, keys or make_hub_key_map(CONFIG), stored_dtype)
    return error.value.problems


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, num_keys, num_params",
    [
        (presets.ovis1_6_gemma2_9b, 916, 10_206_910_518),
        (presets.ovis1_6_llama3_2_3b, 706, 4_144_399_926),
    ],
)
def test_published_counts(preset, num_keys, num_params):
    config = preset()
    keys, shapes, unused = (
        make_hub_key_map(config),
        param_shapes(config),
        unused_tensor_shapes(config),
    )
    assert len(keys.parameters) + len(keys.unused) == num_keys
    assert keys.unused.keys() == unused.keys()
    total = sum(math.prod(shapes[path]) for path in keys.parameters.values())
    assert total + sum(map(math.prod, unused.values())) == num_params
    tree = jax.eval_shape(Ovis(config).init, jax.random.key(0))
    assert {path: x.shape for path, x in flatten_dict(tree, sep="/").items()} == shapes


@pytest.mark.parametrize(
    "config",
    [
        presets.tiny(),
        presets.tiny_llama(),
        presets.ovis1_6_gemma2_9b(),
        presets.ovis1_6_gemma2_27b(),
    ],
)
def test_keys_and_parameters_are_one_to_one(config):
    paths = list(make_hub_key_map(config).parameters.values())
    assert sorted(paths) == sorted(param_shapes(config))
    assert len(set(paths)) == len(paths)


def test_tables_cover_each_other():
    assert set(HUB_KEYS.values()) == PARAM_AXES.keys()
    assert not HUB_KEYS.keys() & UNUSED_HUB_KEYS.keys()
    assert LLAMA_HUB_KEYS.keys() <= HUB_KEYS.keys()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_golden_folders_match(name):
    index = read_tensor_index(GOLDEN / name)
    dtype = "F32" if name == "tiny-f32" else "BF16"
    matched = match_tensors(index, CONFIG, make_hub_key_map(CONFIG), dtype)
    assert list(matched.sources) == list(param_shapes(CONFIG))
    assert len(matched.sources) + len(matched.unused_found) == len(index.tensors) == 98
    assert not matched.unused_missing
    shapes = unused_tensor_shapes(CONFIG)
    assert all(info.shape == shapes[info.key] for info, _ in matched.unused_found)


def test_unused_tensors_may_be_absent():
    probe = "visual_tokenizer.backbone.vision_model.head.probe"
    matched = match_tensors(make_index({probe: None}), CONFIG, make_hub_key_map(CONFIG), "F32")
    assert matched.unused_missing == (probe,)
    assert len(matched.unused_found) == 12


def test_all_faults_at_once():
    rows = problems(
        make_index(
            {
                "vte.weight": None,
                "llm.model.norm.weight": ("F32", (63,)),
                "llm.model.layers.0.self_attn.q_proj.weight": ("F32", (60, 64)),
                "llm.model.layers.1.mlp.up_proj.weight": ("F64", (128, 64)),
                "llm.model.layers.2.mlp.up_proj.weight": ("F16", (128, 64)),
                "llm.model.layers.4.mlp.up_proj.weight": ("F32", (128, 64)),
                "llm.model.layers.3.mlp.up_proj.weight": ("F32", (1, 128, 64)),
            }
        )
    )
    by_fault = {(row.key, row.problem): row for row in rows}
    assert len(by_fault) == len(rows) == 7
    assert by_fault["vte.weight", "missing key"].expected == "[69, 64] for visual_embedding"
    norm = by_fault["llm.model.norm.weight", "wrong shape"]
    assert "D = 64" in norm.expected
    assert "D = 63" in norm.found
    query = by_fault["llm.model.layers.0.self_attn.q_proj.weight", "wrong shape"]
    assert "N * H = 64" in query.expected
    assert "N * H = 60" in query.found
    assert "D =" not in query.found
    assert by_fault["llm.model.layers.1.mlp.up_proj.weight", "wrong dtype"].found == "F64"
    assert by_fault["llm.model.layers.2.mlp.up_proj.weight", "wrong dtype"].expected == "F32"
    assert ("llm.model.layers.3.mlp.up_proj.weight", "wrong shape") in by_fault
    assert ("llm.model.layers.4.mlp.up_proj.weight", "unknown key") in by_fault


def test_any_of_three_dtypes_without_a_stored_dtype():
    mixed = {"vte.weight": ("BF16", (69, 64)), "llm.model.norm.weight": ("F16", (64,))}
    assert match_tensors(make_index(mixed), CONFIG, make_hub_key_map(CONFIG), None)
    (row,) = problems(make_index({"vte.weight": ("I8", (69, 64))}), stored_dtype=None)
    assert row.expected == "one of F32, F16, BF16"


def test_tied_checkpoint_with_an_output_matrix():
    index = make_index({"llm.lm_head.weight": ("F32", (600, 64))})
    matched = match_tensors(index, CONFIG, make_hub_key_map(CONFIG), "F32")
    assert matched.tied_output is not None
    output, embedding = matched.tied_output
    assert (output.key, embedding.key) == ("llm.lm_head.weight", "llm.model.embed_tokens.weight")
    (reason,) = [why for info, why in matched.unused_found if info.key == "llm.lm_head.weight"]
    assert "tied" in reason
    (row,) = problems(make_index({"llm.lm_head.weight": ("F32", (601, 64))}))
    assert (row.key, row.problem) == ("llm.lm_head.weight", "wrong shape")


def test_untied_checkpoint():
    untied = dataclasses.replace(
        CONFIG, decoder=dataclasses.replace(CONFIG.decoder, tie_embeddings=False)
    )
    index = make_index({"llm.lm_head.weight": ("F32", (600, 64))})
    matched = match_tensors(index, untied, make_hub_key_map(untied), "F32")
    assert matched.sources["decoder/unembed"].key == "llm.lm_head.weight"


def test_key_map_with_missing_and_repeated_parameters():
    right = make_hub_key_map(CONFIG).parameters
    wrong = {**right, "vte.weight": "decoder/final_norm"}
    found = {(row.problem, row.key) for row in problems(make_index(), KeyMap(wrong, {}))}
    assert ("parameter without a key", "visual_embedding") in found
    assert ("parameter with several keys", "decoder/final_norm") in found
    stray = {**right, "vte.weight": "decoder/nothing"}
    found = {(row.problem, row.key) for row in problems(make_index(), KeyMap(stray, {}))}
    assert ("no such parameter", "vte.weight") in found


def test_converted_keys_are_parameter_paths():
    assert list(make_converted_key_map(CONFIG).parameters) == list(param_shapes(CONFIG))
    assert not make_converted_key_map(CONFIG).unused


def test_message_escapes_control_characters():
    evil = "a\x1b[2Jb\ud800"
    with pytest.raises(CheckpointValidationError) as error:
        match_tensors(make_index({evil: ("F32", (1,))}), CONFIG, make_hub_key_map(CONFIG), "F32")
    assert "\x1b" not in str(error.value)
    str(error.value).encode()
