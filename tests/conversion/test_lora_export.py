"""Exporting LoRA adapters for PEFT and merged; `test_parity.py` loads them with peft."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_copies import CHECKPOINTS, GOLDEN, copy_golden, read_tensors, rewrite_shard, same_bits
from random_adapters import random_adapters
from safetensors import safe_open

from ovis_jax import presets
from ovis_jax.checkpoint.adapters import save_adapters
from ovis_jax.checkpoint.checkpoint_problems import CheckpointValidationError
from ovis_jax.checkpoint.key_map import UNUSED_HUB_KEYS, make_hub_key_map
from ovis_jax.checkpoint.params import load_params, save_params
from ovis_jax.conversion import tensor_chunks
from ovis_jax.conversion.peft_export import export_peft_adapter
from ovis_jax.conversion.to_hf import export_to_hf
from ovis_jax.errors import CheckpointError, OvisError
from ovis_jax.loading import load
from ovis_jax.model.lora import attach_adapters, merge_adapters

CONFIG = presets.tiny()
QUERY = "decoder/block_1/attn/q"
QUERY_KEY = "llm.model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """Adapters of rank 4 and scale 1.5 on every matrix; not to be changed."""
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    save_adapters(folder, random_adapters(CONFIG), CONFIG, scale=1.5)
    return folder


def merged_by_hand(checkpoint: str) -> dict[str, np.ndarray]:
    """Every tensor of a golden checkpoint by its key on the Hub, with the adapters merged."""
    params = load_params(GOLDEN / checkpoint, CONFIG)
    adapters = {path: jnp.asarray(x) for path, x in random_adapters(CONFIG).items()}
    merged = flatten_dict(merge_adapters(attach_adapters(params, adapters, 1.5)), sep="/")
    keys = make_hub_key_map(CONFIG).parameters
    return read_tensors(GOLDEN / checkpoint) | {key: np.asarray(merged[keys[key]]) for key in keys}


def assert_same_tensors(folder: Path, expected: dict[str, np.ndarray]) -> None:
    found = read_tensors(folder)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[key], tensor) for key, tensor in expected.items())


def test_peft_folder(converted, lora, tmp_path):
    returned = export_peft_adapter(converted["tiny-f32"], tmp_path / "out", lora)
    record = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert record == returned
    assert record["peft_type"] == "LORA" and record["task_type"] == "CAUSAL_LM"
    assert record["base_model_name_or_path"] == "tiny-f32"
    assert (record["r"], record["lora_alpha"], record["bias"]) == (4, 6.0, "none")
    modules = record["target_modules"]
    assert len(modules) == len(set(modules)) == 6 * CONFIG.vision.depth + 1 + 28
    for module in (
        "llm.model.layers.3.mlp.down_proj",
        "visual_tokenizer.head.0",
        "visual_tokenizer.backbone.vision_model.encoder.layers.0.self_attn.out_proj",
    ):
        assert module in modules
    tensors, adapters = read_tensors(tmp_path / "out"), random_adapters(CONFIG)
    names = {f"base_model.model.{m}.lora_{half}.weight" for m in modules for half in "AB"}
    assert tensors.keys() == names
    module = f"base_model.model.{QUERY_KEY.removesuffix('.weight')}"
    assert same_bits(tensors[f"{module}.lora_A.weight"], adapters[f"{QUERY}/lora_a"])
    assert same_bits(tensors[f"{module}.lora_B.weight"], adapters[f"{QUERY}/lora_b"])
    with safe_open(tmp_path / "out/adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_base_model_name_and_dtype(converted, lora, tmp_path):
    save_params(tmp_path / "trained", load_params(GOLDEN / "tiny-f32", CONFIG), CONFIG)
    record = export_peft_adapter(tmp_path / "trained", tmp_path / "a", lora)
    assert record["base_model_name_or_path"] == "trained"
    record = export_peft_adapter(GOLDEN / "tiny-f32", tmp_path / "b", lora, dtype="float16")
    assert record["base_model_name_or_path"] == "tiny-f32"
    assert {x.dtype for x in read_tensors(tmp_path / "b").values()} == {np.dtype(np.float16)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_merged_export_equals_merge_adapters(name, converted, lora, tmp_path):
    expected, before = merged_by_hand(name), read_tensors(GOLDEN / name)
    changed = {key for key in before if not same_bits(before[key], expected[key])}
    assert len(changed) == 6 * CONFIG.vision.depth + 1 + 28
    export_to_hf(converted[name], tmp_path / "out", source=GOLDEN / name, merge=lora)
    assert_same_tensors(tmp_path / "out", expected)
    # A folder in the Hub's layout has the never-used tensors.
    export_to_hf(GOLDEN / name, tmp_path / "again", merge=lora)
    assert_same_tensors(tmp_path / "again", expected)
    assert load(tmp_path / "out").config == CONFIG


def test_merged_export_in_another_dtype_is_rounded_once(converted, lora, tmp_path):
    export_to_hf(converted["tiny-f32"], tmp_path / "out", merge=lora, dtype="float16")
    expected = merged_by_hand("tiny-f32")[QUERY_KEY].astype(np.float16)
    assert same_bits(read_tensors(tmp_path / "out")[QUERY_KEY], expected)


def test_only_the_adapted_matrices_are_computed(converted, tmp_path, monkeypatch):
    save_adapters(tmp_path / "one", random_adapters(CONFIG, targets=QUERY), CONFIG, scale=1.5)
    computed, merge = [], tensor_chunks.LowRank.merged
    monkeypatch.setattr(
        tensor_chunks.LowRank, "merged", lambda self: computed.append(self.w.shape) or merge(self)
    )
    export_to_hf(converted["tiny-f32"], tmp_path / "out", merge=tmp_path / "one")
    assert computed == [(64, 64)]
    before, after = read_tensors(GOLDEN / "tiny-f32"), read_tensors(tmp_path / "out")
    used = make_hub_key_map(CONFIG).parameters
    assert {key for key in used if not same_bits(before[key], after[key])} == {QUERY_KEY}


def test_command(converted, lora, tmp_path, export):
    result = export(converted["tiny-f32"], "peft", "--adapters", lora)
    assert (result.exit_code, result.stderr) == (0, "")
    count = 6 * CONFIG.vision.depth + 29
    assert result.stdout == f"peft: PEFT adapter of rank 4 for {count} matrices of tiny-f32\n"
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    result = export(GOLDEN / "tiny-f32", "merged", "--adapters", lora, "--merge")
    assert (result.exit_code, result.stderr) == (0, "")
    never_used = f"tensors that the model never uses: 13 copied from {GOLDEN / 'tiny-f32'}"
    summary = f"98 tensors; {never_used}; the adapters of {lora} were merged"
    assert result.stdout == f"merged: {summary}\n"
    result = export(converted["tiny-f32"], "zeros", "--adapters", lora, "--merge")
    assert "never uses: 13 written as zeros; the adapters of" in result.stdout
    assert_same_tensors(tmp_path / "merged", merged_by_hand("tiny-f32"))


@pytest.mark.parametrize("kept", [12, 0])
def test_checkpoint_without_never_used_tensors(lora, tmp_path, export, kept):
    source = copy_golden("tiny-f32", tmp_path / "lean")
    lacking = list(UNUSED_HUB_KEYS)[kept:]
    rewrite_shard(source / "model.safetensors", dict.fromkeys(lacking))
    result = export("lean", "merged", "--adapters", lora, "--merge")
    assert (result.exit_code, result.stderr) == (0, "")
    origin = {12: "12 copied from lean, 1 written as zeros", 0: "13 written as zeros"}
    assert f"that the model never uses: {origin[kept]}; the adapters of" in result.stdout
    expected = merged_by_hand("tiny-f32")
    assert_same_tensors(
        tmp_path / "merged", expected | {key: np.zeros_like(expected[key]) for key in lacking}
    )


def test_never_used_tensors_of_another_shape(lora, tmp_path, export):
    source = copy_golden("tiny-f32", tmp_path / "odd")
    rewrite_shard(
        source / "model.safetensors", {next(iter(UNUSED_HUB_KEYS)): np.zeros(49, np.float32)}
    )
    result = export("odd", "merged", "--adapters", lora, "--merge")
    assert result.exit_code == 1 and "error: odd: 1 problem" in result.stderr
    assert "--source" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--merge"], "--merge needs --adapters DIR"),
        (["--adapters", "nowhere"], "adapters nowhere: it is not a folder"),
        (["--adapters", "nowhere", "--merge"], "adapters nowhere: it is not a folder"),
        (["--adapters", GOLDEN], "it has no adapters.json"),
        (["--adapters", "x", "--source", GOLDEN], "leave it out, or add --merge"),
    ],
)
def test_usage(converted, tmp_path, export, arguments, message):
    result = export(converted["tiny-f32"], "out", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    result = export("missing", "out", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("merge", [[], ["--merge"]])
def test_faults_are_reported_in_a_table(converted, tmp_path, export, merge):
    save_adapters(tmp_path / "lora", random_adapters(CONFIG), CONFIG, scale=1.5)
    changes = {
        f"{QUERY}/lora_b": None,
        "decoder/block_0/mlp/up/lora_a": np.zeros((4, 65), np.float32),
    }
    rewrite_shard(tmp_path / "lora/adapters.safetensors", changes)
    result = export(converted["tiny-f32"], "out", "--adapters", "lora", *merge)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "adapters lora: 2 problems" in result.stderr
    assert f"{QUERY}/lora_b" in result.stderr and "D = 65" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_checkpoint_of_another_config(lora, tmp_path):
    source = copy_golden("tiny-f32", tmp_path / "other")
    config = json.loads((source / "config.json").read_text())
    config["llm_config"]["sliding_window"] += 1
    (source / "config.json").write_text(json.dumps(config))
    for write in (
        lambda: export_peft_adapter(source, tmp_path / "out", lora),
        lambda: export_to_hf(source, tmp_path / "out", merge=lora),
    ):
        with pytest.raises(
            CheckpointValidationError, match=r"1 problem; .*\n.*llm_config\.sliding_window"
        ):
            write()
    with pytest.raises(OvisError, match="exists and is not an empty folder"):
        export_peft_adapter(source, source, lora)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_source_that_shrinks_while_it_is_merged(lora, tmp_path, monkeypatch):
    source = copy_golden("tiny-f32", tmp_path / "source")
    read = tensor_chunks.read_chunks

    def shrink(info):
        os.truncate(source / "model.safetensors", 1000)
        return read(info)

    monkeypatch.setattr(tensor_chunks, "read_chunks", shrink)
    with pytest.raises(CheckpointError, match="has changed since its header was read"):
        export_to_hf(source, tmp_path / "out", merge=lora)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
