"""Adapters as a PEFT folder, and merged into a checkpoint; `test_parity.py` has peft read them."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import typer
from flax.traverse_util import flatten_dict
from golden_copies import CHECKPOINTS, GOLDEN, copy_golden, read_tensors, rewrite_shard, same_bits
from random_adapters import random_adapters
from safetensors import safe_open
from typer.testing import CliRunner

from convert import exits, transfer
from convert.peft import export_adapters
from convert.to_hf import command, export
from ovis_jax import presets
from ovis_jax.checkpoint.adapters import save_adapters
from ovis_jax.checkpoint.keymap import UNUSED, hub_keys
from ovis_jax.checkpoint.params import load_params, save_params
from ovis_jax.checkpoint.problems import CheckpointProblems
from ovis_jax.errors import CheckpointError, OvisError
from ovis_jax.loading import load
from ovis_jax.training.parts import join, merge_adapters

CONFIG = presets.tiny()
QUERY = "decoder/block_1/attn/q"
QUERY_KEY = "llm.model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """Adapters of rank 4 and scale 1.5 on every matrix; not to be changed."""
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    save_adapters(folder, random_adapters(CONFIG), CONFIG, scale=1.5)
    return folder


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    """The command line in this process, whose signals stay as they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exits.signal, "signal", lambda *_: None)
    app = typer.Typer()
    app.command()(command)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def merged_by_hand(checkpoint: str) -> dict[str, np.ndarray]:
    """Every tensor of a golden checkpoint by its key on the Hub, with the adapters merged."""
    frozen = flatten_dict(load_params(GOLDEN / checkpoint, CONFIG), sep="/")
    adapters = {path: jnp.asarray(x) for path, x in random_adapters(CONFIG).items()}
    merged = flatten_dict(merge_adapters(join(adapters, frozen, 1.5)), sep="/")
    keys = hub_keys(CONFIG).parameters
    return read_tensors(GOLDEN / checkpoint) | {key: np.asarray(merged[keys[key]]) for key in keys}


def assert_same_tensors(folder: Path, expected: dict[str, np.ndarray]) -> None:
    found = read_tensors(folder)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[key], tensor) for key, tensor in expected.items())


def test_layout_of_a_peft_folder(converted, lora, tmp_path):
    returned = export_adapters(converted["tiny-f32"], tmp_path / "out", lora)
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
    assert same_bits(tensors[f"{module}.lora_A.weight"], adapters[f"{QUERY}/a"])
    assert same_bits(tensors[f"{module}.lora_B.weight"], adapters[f"{QUERY}/b"])
    with safe_open(tmp_path / "out/adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_base_by_name_and_dtype(converted, lora, tmp_path):
    save_params(tmp_path / "trained", load_params(GOLDEN / "tiny-f32", CONFIG), CONFIG)
    record = export_adapters(tmp_path / "trained", tmp_path / "a", lora)
    assert record["base_model_name_or_path"] == "trained"
    record = export_adapters(GOLDEN / "tiny-f32", tmp_path / "b", lora, dtype="float16")
    assert record["base_model_name_or_path"] == "tiny-f32"
    assert {x.dtype for x in read_tensors(tmp_path / "b").values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_merged_export_is_what_merge_adapters_gives(name, converted, lora, tmp_path):
    expected, before = merged_by_hand(name), read_tensors(GOLDEN / name)
    changed = {key for key in before if not same_bits(before[key], expected[key])}
    assert len(changed) == 6 * CONFIG.vision.depth + 1 + 28
    export(converted[name], tmp_path / "out", source=GOLDEN / name, merge=lora)
    assert_same_tensors(tmp_path / "out", expected)
    # A folder in the Hub's layout holds the tensors that are never used itself.
    export(GOLDEN / name, tmp_path / "again", merge=lora)
    assert_same_tensors(tmp_path / "again", expected)
    assert load(tmp_path / "out").config == CONFIG


def test_merged_export_in_another_dtype_is_rounded_once(converted, lora, tmp_path):
    export(converted["tiny-f32"], tmp_path / "out", merge=lora, dtype="float16")
    expected = merged_by_hand("tiny-f32")[QUERY_KEY].astype(np.float16)
    assert same_bits(read_tensors(tmp_path / "out")[QUERY_KEY], expected)


def test_only_the_adapted_matrices_are_computed(converted, tmp_path, monkeypatch):
    save_adapters(tmp_path / "one", random_adapters(CONFIG, targets=QUERY), CONFIG, scale=1.5)
    computed, merge = [], transfer.LowRank.merged
    monkeypatch.setattr(
        transfer.LowRank, "merged", lambda self: computed.append(self.w.shape) or merge(self)
    )
    export(converted["tiny-f32"], tmp_path / "out", merge=tmp_path / "one")
    assert computed == [(64, 64)]
    before, after = read_tensors(GOLDEN / "tiny-f32"), read_tensors(tmp_path / "out")
    used = hub_keys(CONFIG).parameters
    assert {key for key in used if not same_bits(before[key], after[key])} == {QUERY_KEY}


def test_on_the_command_line(converted, lora, tmp_path, invoke):
    result = invoke(converted["tiny-f32"], "peft", "--lora", lora)
    assert (result.exit_code, result.stderr) == (0, "")
    count = 6 * CONFIG.vision.depth + 29
    assert result.stdout == f"peft: a PEFT adapter of rank 4 on {count} matrices of tiny-f32\n"
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    result = invoke(GOLDEN / "tiny-f32", "merged", "--lora", lora, "--merge")
    assert (result.exit_code, result.stderr) == (0, "")
    never_used = f"the 13 that the model never uses were copied from {GOLDEN / 'tiny-f32'}"
    told = f"98 tensors; {never_used}; the adapters of {lora} were merged"
    assert result.stdout == f"merged: {told}\n"
    result = invoke(converted["tiny-f32"], "zeros", "--lora", lora, "--merge")
    assert "never uses are zeros; the adapters of" in result.stdout
    assert_same_tensors(tmp_path / "merged", merged_by_hand("tiny-f32"))


@pytest.mark.parametrize("kept", [12, 0])
def test_a_checkpoint_without_what_is_never_used(lora, tmp_path, invoke, kept):
    source = copy_golden("tiny-f32", tmp_path / "lean")
    lacking = list(UNUSED)[kept:]
    rewrite_shard(source / "model.safetensors", dict.fromkeys(lacking))
    result = invoke("lean", "merged", "--lora", lora, "--merge")
    assert (result.exit_code, result.stderr) == (0, "")
    told = {
        12: "of the 13 that the model never uses 12 were copied from lean, and 1 that it lacks are",
        0: "the 13 that the model never uses are",
    }
    assert result.stdout.startswith(f"merged: 98 tensors; {told[kept]} zeros; the adapters of")
    expected = merged_by_hand("tiny-f32")
    assert_same_tensors(
        tmp_path / "merged", expected | {key: np.zeros_like(expected[key]) for key in lacking}
    )


def test_a_checkpoint_whose_never_used_are_of_another_shape(lora, tmp_path, invoke):
    source = copy_golden("tiny-f32", tmp_path / "odd")
    rewrite_shard(source / "model.safetensors", {next(iter(UNUSED)): np.zeros(49, np.float32)})
    result = invoke("odd", "merged", "--lora", lora, "--merge")
    assert result.exit_code == 1 and "error: odd: 1 problem" in result.stderr
    assert "--source" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--merge"], "--merge needs --lora ADAPTERS"),
        (["--lora", "nowhere"], "adapters nowhere: it is not a folder"),
        (["--lora", "nowhere", "--merge"], "adapters nowhere: it is not a folder"),
        (["--lora", GOLDEN], "it holds no adapters.json"),
        (["--lora", "x", "--source", GOLDEN], "leave it out, or add --merge"),
    ],
)
def test_usage(converted, tmp_path, invoke, arguments, message):
    result = invoke(converted["tiny-f32"], "out", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    result = invoke("missing", "out", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("merge", [[], ["--merge"]])
def test_faults_get_a_table_and_nothing_is_written(converted, tmp_path, invoke, merge):
    save_adapters(tmp_path / "lora", random_adapters(CONFIG), CONFIG, scale=1.5)
    changes = {f"{QUERY}/b": None, "decoder/block_0/mlp/up/a": np.zeros((4, 65), np.float32)}
    rewrite_shard(tmp_path / "lora/adapters.safetensors", changes)
    result = invoke(converted["tiny-f32"], "out", "--lora", "lora", *merge)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "adapters lora: 2 problems" in result.stderr
    assert f"{QUERY}/b" in result.stderr and "D = 65" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_checkpoint_of_another_config(lora, tmp_path):
    source = copy_golden("tiny-f32", tmp_path / "other")
    config = json.loads((source / "config.json").read_text())
    config["llm_config"]["sliding_window"] += 1
    (source / "config.json").write_text(json.dumps(config))
    for write in (
        lambda: export_adapters(source, tmp_path / "out", lora),
        lambda: export(source, tmp_path / "out", merge=lora),
    ):
        with pytest.raises(
            CheckpointProblems, match=r"1 problem; .*\n.*llm_config\.sliding_window"
        ):
            write()
    with pytest.raises(OvisError, match="exists and is not an empty folder"):
        export_adapters(source, source, lora)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_source_that_shrinks_while_it_is_merged(lora, tmp_path, monkeypatch):
    source = copy_golden("tiny-f32", tmp_path / "source")
    read = transfer.read_chunks

    def shrink(entry):
        os.truncate(source / "model.safetensors", 1000)
        return read(entry)

    monkeypatch.setattr(transfer, "read_chunks", shrink)
    with pytest.raises(CheckpointError, match="has changed since its header was read"):
        export(source, tmp_path / "out", merge=lora)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
