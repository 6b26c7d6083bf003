import dataclasses
import math
from pathlib import Path

import pytest
from golden_copies import CHECKPOINTS, GOLDEN

from ovis_jax import presets
from ovis_jax.checkpoint.folder import CheckpointFolder, open_checkpoint
from ovis_jax.checkpoint.keymap import (
    PARAMETERS,
    UNUSED,
    KeyMap,
    account,
    hub_keys,
    own_keys,
    unused_shapes,
)
from ovis_jax.checkpoint.problems import CheckpointProblems
from ovis_jax.checkpoint.safetensors_files import TensorEntry
from ovis_jax.sharding import PARAM_AXES, param_shapes

CONFIG = presets.tiny()


def listing(changes=None, *, dtype="F32", index=None) -> CheckpointFolder:
    """The tensors of a sound checkpoint, with some replaced, added, or (None) left out."""
    keys = hub_keys(CONFIG)
    shapes = param_shapes(CONFIG)
    tensors = {key: (dtype, shapes[path]) for key, path in keys.parameters.items()}
    tensors |= {key: (dtype, shape) for key, shape in unused_shapes(CONFIG).items()}
    tensors |= changes or {}
    entries = tuple(
        TensorEntry(Path("f.safetensors"), key, tensor[0], tensor[1], 0, 0)
        for key, tensor in tensors.items()
        if tensor is not None
    )
    return CheckpointFolder(Path(), entries, index or {}, frozenset(), ())


def problems(folder, keys=None, stored_dtype: str | None = "F32"):
    with pytest.raises(CheckpointProblems) as error:
        account(folder, CONFIG, keys or hub_keys(CONFIG), stored_dtype)
    return error.value.problems


def test_published_9b_counts():
    config = presets.ovis1_6_gemma2_9b()
    keys, shapes, unused = hub_keys(config), param_shapes(config), unused_shapes(config)
    assert len(keys.parameters) + len(keys.unused) == 916
    assert keys.unused.keys() == unused.keys()
    total = sum(math.prod(shapes[path]) for path in keys.parameters.values())
    assert total + sum(map(math.prod, unused.values())) == 10_206_910_518


@pytest.mark.parametrize(
    "config", [presets.tiny(), presets.ovis1_6_gemma2_9b(), presets.ovis1_6_gemma2_27b()]
)
def test_keys_and_parameters_are_one_to_one(config):
    paths = list(hub_keys(config).parameters.values())
    assert sorted(paths) == sorted(param_shapes(config))
    assert len(set(paths)) == len(paths)


def test_tables_cover_each_other():
    assert set(PARAMETERS.values()) == PARAM_AXES.keys()
    assert not PARAMETERS.keys() & UNUSED.keys()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_golden_folders_are_accounted_for(name):
    folder = open_checkpoint(GOLDEN / name)
    plan = account(folder, CONFIG, hub_keys(CONFIG), "F32" if name == "tiny-f32" else "BF16")
    assert list(plan.sources) == list(param_shapes(CONFIG))
    assert len(plan.sources) + len(plan.unused) == len(folder.tensors) == 98
    assert not plan.absent
    shapes = unused_shapes(CONFIG)
    assert all(entry.shape == shapes[entry.key] for entry, _ in plan.unused)


def test_unused_tensors_may_be_absent():
    probe = "visual_tokenizer.backbone.vision_model.head.probe"
    plan = account(listing({probe: None}), CONFIG, hub_keys(CONFIG), "F32")
    assert plan.absent == (probe,)
    assert len(plan.unused) == 12


def test_all_faults_at_once():
    rows = problems(
        listing(
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
    told = {(row.key, row.problem): row for row in rows}
    assert len(told) == len(rows) == 7
    assert told["vte.weight", "missing key"].expected == "[69, 64] for visual_embedding"
    norm = told["llm.model.norm.weight", "wrong shape"]
    assert "D = 64" in norm.expected
    assert "D = 63" in norm.found
    query = told["llm.model.layers.0.self_attn.q_proj.weight", "wrong shape"]
    assert "N * H = 64" in query.expected
    assert "N * H = 60" in query.found
    assert "D =" not in query.found
    assert told["llm.model.layers.1.mlp.up_proj.weight", "wrong dtype"].found == "F64"
    assert told["llm.model.layers.2.mlp.up_proj.weight", "wrong dtype"].expected == "F32"
    assert ("llm.model.layers.3.mlp.up_proj.weight", "wrong shape") in told
    assert ("llm.model.layers.4.mlp.up_proj.weight", "unknown key") in told


def test_any_of_three_dtypes_when_none_is_demanded():
    mixed = {"vte.weight": ("BF16", (69, 64)), "llm.model.norm.weight": ("F16", (64,))}
    assert account(listing(mixed), CONFIG, hub_keys(CONFIG), None)
    (row,) = problems(listing({"vte.weight": ("I8", (69, 64))}), stored_dtype=None)
    assert row.expected == "one of F32, F16, BF16"


def test_tied_checkpoint_with_a_head_of_its_own():
    (row,) = problems(listing({"llm.lm_head.weight": ("F32", (600, 64))}))
    assert (row.key, row.problem) == ("llm.lm_head.weight", "unknown key")


def test_untied_checkpoint():
    untied = dataclasses.replace(
        CONFIG, decoder=dataclasses.replace(CONFIG.decoder, tie_embeddings=False)
    )
    folder = listing({"llm.lm_head.weight": ("F32", (600, 64))})
    plan = account(folder, untied, hub_keys(untied), "F32")
    assert plan.sources["decoder/unembed"].key == "llm.lm_head.weight"


def test_key_map_that_writes_a_parameter_twice_or_never():
    right = hub_keys(CONFIG).parameters
    wrong = {**right, "vte.weight": "decoder/final_norm"}
    told = {(row.problem, row.key) for row in problems(listing(), KeyMap(wrong, {}))}
    assert ("parameter never written", "visual_embedding") in told
    assert ("parameter written twice", "decoder/final_norm") in told
    stray = {**right, "vte.weight": "decoder/nothing"}
    told = {(row.problem, row.key) for row in problems(listing(), KeyMap(stray, {}))}
    assert ("no such parameter", "vte.weight") in told


def test_own_keys_name_themselves():
    assert list(own_keys(CONFIG).parameters) == list(param_shapes(CONFIG))
    assert not own_keys(CONFIG).unused


def test_message_escapes_what_a_terminal_would_obey():
    evil = "a\x1b[2Jb\ud800"
    with pytest.raises(CheckpointProblems) as error:
        account(listing({evil: ("F32", (1,))}), CONFIG, hub_keys(CONFIG), "F32")
    assert "\x1b" not in str(error.value)
    str(error.value).encode()
