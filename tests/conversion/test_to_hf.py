import json
import os
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_copies import (
    CHECKPOINTS,
    GOLDEN,
    GOLDEN_LLAMA,
    copy_golden,
    read_tensors,
    rewrite_shard,
    same_bits,
    shard_with,
)
from safetensors import safe_open

from ovis_jax import presets
from ovis_jax.checkpoint.checkpoint_problems import CheckpointValidationError
from ovis_jax.checkpoint.key_map import UNUSED_HUB_KEYS, make_hub_key_map
from ovis_jax.checkpoint.params import load_params, save_params
from ovis_jax.config import OvisConfig
from ovis_jax.conversion import tensor_chunks
from ovis_jax.conversion.from_hf import convert_from_hf
from ovis_jax.conversion.to_hf import export_to_hf
from ovis_jax.errors import CheckpointError, OvisError
from ovis_jax.loading import load

CONFIG = presets.tiny()
NORM = "visual_tokenizer.backbone.vision_model.post_layernorm.weight"
PROBE = "visual_tokenizer.backbone.vision_model.head.probe"


def assert_same_tensors(folder: Path, expected: dict[str, np.ndarray]) -> None:
    found = read_tensors(folder)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert same_bits(found[key], tensor), key


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_round_trip_is_bit_equal(name, converted, tmp_path):
    out = tmp_path / "out"
    assert export_to_hf(converted[name], out, source=GOLDEN / name, max_shard_bytes=200_000) == (
        98,
        13,
    )
    assert_same_tensors(out, read_tensors(GOLDEN / name))
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    assert shards == [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    small = {
        path.name: path.read_bytes()
        for path in GOLDEN.joinpath(name).iterdir()
        if not path.name.startswith("model")
    }
    assert len(small) == 7
    assert {path.name for path in out.iterdir()} == {
        *small,
        *shards,
        "model.safetensors.index.json",
    }
    assert all((out / file).read_bytes() == content for file, content in small.items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_llama_round_trip_is_bit_equal(tmp_path):
    source = GOLDEN_LLAMA / "tiny-f32"
    convert_from_hf(source, tmp_path / "converted")
    converted, original = load(tmp_path / "converted"), load(source)
    assert converted.config == original.config
    jax.tree.map(np.testing.assert_array_equal, converted.params, original.params)
    out = tmp_path / "out"
    assert export_to_hf(tmp_path / "converted", out, source=source) == (90, 13)
    assert_same_tensors(out, read_tensors(source))
    for path in source.glob("*.json"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_without_a_source_never_used_tensors_are_zero(converted, tmp_path):
    export_to_hf(converted["tiny-f32"], tmp_path / "out")
    before = read_tensors(GOLDEN / "tiny-f32")
    assert all(before[key].any() for key in UNUSED_HUB_KEYS)
    zeros = {key: np.zeros_like(before[key]) for key in UNUSED_HUB_KEYS}
    assert_same_tensors(tmp_path / "out", before | zeros)


def test_index_and_headers(converted, tmp_path):
    out = tmp_path / "out"
    export_to_hf(converted["tiny-f32"], out, max_shard_bytes=300_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = read_tensors(out)
    held = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            held |= {key: path.name for key in file.keys()}
    keys = make_hub_key_map(CONFIG)
    assert index["weight_map"] == held
    assert held.keys() == keys.parameters.keys() | keys.unused.keys()
    assert index["metadata"] == {"total_size": sum(value.nbytes for value in tensors.values())}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_export_loads_as_its_source(name, converted, tmp_path):
    export_to_hf(converted[name], tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.config == CONFIG
    expected = flatten_dict(load_params(GOLDEN / name, CONFIG), sep="/")
    found = flatten_dict(loaded.params, sep="/")
    assert found.keys() == expected.keys()
    assert all(same_bits(np.asarray(found[p]), np.asarray(expected[p])) for p in found)


def test_converted_export_equals_its_source(converted, tmp_path):
    export_to_hf(converted["tiny-f32"], tmp_path / "out")
    convert_from_hf(tmp_path / "out", tmp_path / "again")
    assert_same_tensors(tmp_path / "again", read_tensors(converted["tiny-f32"]))


def test_saved_parameters_of_an_untied_model(tmp_path):
    text = (GOLDEN / "tiny-f32" / "config.json").read_text()
    parsed = json.loads(text) | {"disable_tie_weight": True}
    generation = json.loads((GOLDEN / "tiny-f32" / "generation_config.json").read_text())
    config = OvisConfig.from_hf(parsed, generation)
    params = load_params(GOLDEN / "tiny-f32", CONFIG)
    params["decoder"]["unembed"] = np.random.default_rng(0).standard_normal((600, 64), np.float32)
    save_params(tmp_path / "own", params, config)
    assert export_to_hf(tmp_path / "own", tmp_path / "out", source=GOLDEN / "tiny-f32") == (99, 13)
    head = {"llm.lm_head.weight": params["decoder"]["unembed"]}
    assert_same_tensors(tmp_path / "out", read_tensors(GOLDEN / "tiny-f32") | head)
    assert OvisConfig.from_folder(tmp_path / "out") == config
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_cast(converted, tmp_path):
    golden, out = GOLDEN / "tiny-f32", tmp_path / "out"
    export_to_hf(converted["tiny-f32"], out, source=golden, dtype="bfloat16")
    before = read_tensors(golden)
    assert_same_tensors(out, {key: x.astype(ml_dtypes.bfloat16) for key, x in before.items()})
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == config["llm_config"]["torch_dtype"] == "bfloat16"
    assert OvisConfig.from_folder(out) == CONFIG


def test_source_of_another_dtype_is_cast(converted, tmp_path):
    source = GOLDEN / "tiny-bf16-sharded"
    export_to_hf(converted["tiny-f32"], tmp_path / "out", source=source)
    unused = {key: value.astype(np.float32) for key, value in read_tensors(source).items()}
    unused = {key: unused[key] for key in UNUSED_HUB_KEYS}
    assert_same_tensors(tmp_path / "out", read_tensors(GOLDEN / "tiny-f32") | unused)


def test_memory_is_less_than_one_tensor(tmp_path):
    rows = 200_000
    config_json, generation = CONFIG.to_hf()
    config_json["llm_config"]["vocab_size"] = rows
    config = OvisConfig.from_hf(config_json, generation)
    params = load_params(GOLDEN / "tiny-f32", CONFIG)
    params["decoder"]["embed"] = np.ones((rows, CONFIG.decoder.width), np.float32)
    size = params["decoder"]["embed"].nbytes
    save_params(tmp_path / "own", params, config)
    del params
    tracemalloc.start()
    export_to_hf(tmp_path / "own", tmp_path / "out", dtype="bfloat16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 50_000_000
    assert peak < 40_000_000


def test_progress_reaches_the_total(converted, tmp_path):
    calls = []
    out = tmp_path / "out"
    export_to_hf(converted["tiny-f32"], out, progress=lambda *call: calls.append(call))
    assert {call[0] for call in calls} == read_tensors(out).keys()
    assert calls[-1][1] == calls[-1][2] == sum(x.nbytes for x in read_tensors(out).values())
    assert [call[1] for call in calls] == sorted(call[1] for call in calls)


@pytest.mark.parametrize(
    ("tensor", "fault"),
    [
        (None, "missing key: expected [48], found no such tensor"),
        (np.zeros(49, np.float32), "wrong shape: expected [48] 'E', E = 48, found [49], E = 49"),
        (np.zeros(48, np.int32), "wrong dtype: expected one of F32, F16, BF16, found I32"),
    ],
)
def test_source_that_lacks_a_tensor(converted, tmp_path, tensor, fault):
    source = copy_golden("tiny-f32", tmp_path / "source")
    rewrite_shard(source / "model.safetensors", {NORM: tensor})
    with pytest.raises(CheckpointValidationError) as caught:
        export_to_hf(converted["tiny-f32"], tmp_path / "out", source=source)
    (problem,) = caught.value.problems
    assert f"{NORM}: {fault}" in str(problem)
    assert "leave out --source" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_source_with_one_tensor_in_two_files_and_one_in_none(converted, tmp_path):
    source = copy_golden("tiny-bf16-sharded", tmp_path / "source")
    other = shard_with(source, "llm.model.embed_tokens.weight")
    assert other != shard_with(source, NORM)
    rewrite_shard(other, {NORM: np.zeros(48, ml_dtypes.bfloat16)})
    rewrite_shard(shard_with(source, PROBE), {PROBE: None})
    with pytest.raises(CheckpointValidationError) as caught:
        export_to_hf(converted["tiny-f32"], tmp_path / "out", source=source)
    faults = {(problem.key, problem.problem) for problem in caught.value.problems}
    assert faults == {(NORM, "in two files"), (PROBE, "missing key")}


def test_folder_that_is_not_converted(converted, tmp_path):
    with pytest.raises(OvisError, match=r"has no conversion\.json.* Hub's layout needs no export"):
        export_to_hf(GOLDEN / "tiny-f32", tmp_path / "out")
    with pytest.raises(OvisError, match="nowhere is not a folder"):
        export_to_hf(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(OvisError, match="expected float32, float16 or bfloat16"):
        export_to_hf(converted["tiny-f32"], tmp_path / "out", dtype="int8")
    assert not list(tmp_path.iterdir())


def test_source_that_is_not_in_the_layout_of_the_hub(converted, tmp_path):
    own = converted["tiny-f32"]
    with pytest.raises(OvisError, match="is a converted folder, which lacks them"):
        export_to_hf(own, tmp_path / "out", source=own)
    with pytest.raises(OvisError, match="is not a folder"):
        export_to_hf(own, tmp_path / "out", source=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        export_to_hf(own, tmp_path / "out", source=tmp_path)
    assert not list(tmp_path.iterdir())


def test_linked_files_are_copied(tmp_path):
    convert_from_hf(GOLDEN / "tiny-f32", tmp_path / "own")
    content = (tmp_path / "own/tokenizer.json").read_bytes()
    (tmp_path / "own/tokenizer.json").rename(tmp_path / "elsewhere")
    (tmp_path / "own/tokenizer.json").symlink_to(tmp_path / "elsewhere")
    export_to_hf(tmp_path / "own", tmp_path / "out")
    assert not (tmp_path / "out/tokenizer.json").is_symlink()
    assert (tmp_path / "out/tokenizer.json").read_bytes() == content


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failure_in_the_middle_creates_no_destination(converted, tmp_path, error):
    def fail(key: str, done: int, total: int) -> None:
        if done > total // 2:
            raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        export_to_hf(converted["tiny-f32"], tmp_path / "out", progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_source_that_shrinks_in_the_middle(converted, tmp_path, monkeypatch):
    source = copy_golden("tiny-f32", tmp_path / "source")
    read = tensor_chunks.read_chunks

    def shrink(info):
        os.truncate(source / "model.safetensors", 1000)
        return read(info)

    monkeypatch.setattr(tensor_chunks, "read_chunks", shrink)
    with pytest.raises(CheckpointError, match="has changed since its header was read"):
        export_to_hf(converted["tiny-f32"], tmp_path / "out", source=source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
