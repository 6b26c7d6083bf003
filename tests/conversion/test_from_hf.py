import hashlib
import json
import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_copies import (
    CHECKPOINTS,
    GOLDEN,
    copy_golden,
    read_files,
    read_tensors,
    rewrite_shard,
    same_bits,
)
from safetensors.numpy import save_file

from ovis_jax import presets
from ovis_jax.checkpoint import hub
from ovis_jax.checkpoint.checkpoint_problems import CheckpointValidationError
from ovis_jax.checkpoint.key_map import make_hub_key_map
from ovis_jax.checkpoint.params import load_params
from ovis_jax.checkpoint.resolve import resolve_checkpoint
from ovis_jax.checkpoint.safetensors_reader import read_header
from ovis_jax.config import OvisConfig
from ovis_jax.conversion.from_hf import convert_from_hf, plan_conversion
from ovis_jax.errors import CheckpointError, ConfigError, OvisError
from ovis_jax.loading import load

ROOT = Path(__file__).parents[2]
CONFIG = presets.tiny()
COPIED = (
    "generation_config.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_golden_folders_convert_bit_equal(name, tmp_path):
    record = convert_from_hf(GOLDEN / name, tmp_path / "out", max_shard_bytes=200_000)
    before, after = read_tensors(GOLDEN / name), read_tensors(tmp_path / "out")
    keys = make_hub_key_map(CONFIG)
    assert len(after) == len(keys.parameters)
    for key, path in keys.parameters.items():
        assert same_bits(after[path], before[key])
    for file in (*COPIED, "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (GOLDEN / name / file).read_bytes()
    assert json.loads((tmp_path / "out" / "conversion.json").read_text()) == record
    assert record["source"] == {"name": name, "revision": None}
    assert record["source_keys"] == 98
    assert record["not_used"].keys() == keys.unused.keys()
    assert record["parameters"] == sum(value.size for value in after.values())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert record["sha256"] == {
        shard.name: hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards
    }
    assert str(ROOT) not in json.dumps(record)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_converted_folder_loads_as_the_hub_folder(name, tmp_path):
    convert_from_hf(GOLDEN / name, tmp_path / "out")
    expected = flatten_dict(load_params(GOLDEN / name, CONFIG), sep="/")
    found = flatten_dict(load_params(tmp_path / "out", CONFIG), sep="/")
    assert found.keys() == expected.keys()
    assert all(same_bits(np.asarray(found[x]), np.asarray(expected[x])) for x in expected)


def test_two_conversions_are_byte_equal(tmp_path):
    for name in ("a", "b"):
        convert_from_hf(GOLDEN / "tiny-f32", tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_cast(tmp_path):
    record = convert_from_hf(GOLDEN / "tiny-f32", tmp_path / "out", dtype="bfloat16")
    assert record["dtype"] == "bfloat16"
    before, after = read_tensors(GOLDEN / "tiny-f32"), read_tensors(tmp_path / "out")
    for key, path in make_hub_key_map(CONFIG).parameters.items():
        assert same_bits(after[path], before[key].astype(ml_dtypes.bfloat16))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["llm_config"]["torch_dtype"] == "bfloat16"
    assert OvisConfig.from_folder(tmp_path / "out") == CONFIG
    assert load_params(tmp_path / "out", CONFIG)["visual_embedding"].dtype == ml_dtypes.bfloat16


def test_progress_reaches_the_total(tmp_path):
    calls = []
    convert_from_hf(
        GOLDEN / "tiny-f32", tmp_path / "out", progress=lambda *call: calls.append(call)
    )
    assert (
        calls[-1][1]
        == calls[-1][2]
        == sum(t.nbytes for t in read_tensors(tmp_path / "out").values())
    )
    assert [call[1] for call in calls] == sorted(call[1] for call in calls)


@pytest.mark.slow
def test_memory_is_less_than_one_tensor(tmp_path):
    folder = copy_golden("tiny-f32", tmp_path / "large")
    rows = 300_000
    for name in ("config.json", "generation_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('"vocab_size": 600', f'"vocab_size": {rows}'))
    embed = np.random.default_rng(0).standard_normal((rows, 64), np.float32)
    rewrite_shard(folder / "model.safetensors", {"llm.model.embed_tokens.weight": embed})
    size, digest = embed.nbytes, hashlib.sha256(embed.astype(ml_dtypes.bfloat16).tobytes())
    del embed
    tracemalloc.start()
    convert_from_hf(folder, tmp_path / "same")
    convert_from_hf(folder, tmp_path / "cast", dtype="bfloat16")
    convert_from_hf(folder, tmp_path / "int4", quantization="int4")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 70_000_000
    assert peak < 40_000_000
    result = read_tensors(tmp_path / "cast")["decoder/embed"]
    assert hashlib.sha256(result.tobytes()).digest() == digest.digest()


def test_error_in_the_middle_creates_no_destination(tmp_path):
    def fail(path: str, done: int, total: int) -> None:
        if done > total // 2:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        convert_from_hf(GOLDEN / "tiny-f32", tmp_path / "out", progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_cast_that_overflows_creates_no_destination(tmp_path):
    folder = copy_golden("tiny-f32", tmp_path / "in")
    change = {"llm.model.norm.weight": np.full(64, 1e6, np.float32)}
    rewrite_shard(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError, match="too large for float16"):
        convert_from_hf(folder, tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (["config.json"], "config.json does not exist"),
        (["generation_config.json"], "generation_config.json does not exist"),
        (["preprocessor_config.json"], "preprocessor_config.json is missing"),
        (["tokenizer.model", "tokenizer.json"], "neither tokenizer.model with"),
        (["tokenizer.json", "tokenizer_config.json"], "neither tokenizer.model with"),
    ],
)
def test_required_files(tmp_path, removed, message):
    folder = copy_golden("tiny-f32", tmp_path / "in")
    for name in removed:
        (folder / name).unlink()
    with pytest.raises(ConfigError, match=message):
        convert_from_hf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_of_links(tmp_path):
    """The files are copied, not the links, and the result is that of the files themselves."""
    (tmp_path / "links").mkdir()
    for path in (GOLDEN / "tiny-f32").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    convert_from_hf(GOLDEN / "tiny-f32", tmp_path / "files/tiny-f32")
    convert_from_hf(tmp_path / "links", tmp_path / "out")
    expected, found = read_files(tmp_path / "files/tiny-f32"), read_files(tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    del expected["conversion.json"], found["conversion.json"]  # states the name of the source
    assert found == expected


def copy_with_output_matrix(folder: Path, row: int | None = None) -> Path:
    """A tied checkpoint with a copy of the embedding as output matrix, or with one other row."""
    copy_golden("tiny-f32", folder)
    output = read_tensors(folder)["llm.model.embed_tokens.weight"].copy()
    if row is not None:
        output[row, 3] += 1
    rewrite_shard(folder / "model.safetensors", {"llm.lm_head.weight": output})
    return folder


def test_copy_of_the_tied_embedding_is_not_used(tmp_path):
    record = convert_from_hf(copy_with_output_matrix(tmp_path / "in"), tmp_path / "out")
    assert "tied" in record["not_used"]["llm.lm_head.weight"]
    expected = convert_from_hf(GOLDEN / "tiny-f32", tmp_path / "expected")
    assert record["sha256"] == expected["sha256"]
    assert record["source_keys"] == expected["source_keys"] + 1


def test_output_matrix_that_differs_from_the_tied_embedding(tmp_path):
    folder = copy_with_output_matrix(tmp_path / "in", row=597)
    for read in (load, lambda folder: convert_from_hf(folder, tmp_path / "out")):
        with pytest.raises(CheckpointValidationError) as caught:
            read(folder)
        (row,) = caught.value.problems
        assert (row.key, row.problem) == ("llm.lm_head.weight", "differs from the tied embedding")
        assert row.found == "other numbers in row 597"
        assert "set disable_tie_weight to true in config.json" in caught.value.summary
    assert not (tmp_path / "out").exists()
    for field in ("disable_tie_weight", "tie_word_embeddings"):
        config = json.loads((GOLDEN / "tiny-f32/config.json").read_text())
        if field == "disable_tie_weight":
            config[field] = True
        else:
            config["llm_config"][field] = False
        (folder / "config.json").write_text(json.dumps(config))
        unembed = np.asarray(load(folder).params["decoder"]["unembed"])
        assert np.array_equal(unembed, read_tensors(folder)["llm.lm_head.weight"])


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_both_spellings_of_the_dtype(tmp_path, field):
    folder = copy_golden("tiny-f32", tmp_path / "in")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config["llm_config"]):
        part.pop("torch_dtype", None)
        part[field] = "float32"
    path.write_text(json.dumps(config))
    assert convert_from_hf(folder, tmp_path / "same")["dtype"] == "float32"
    assert convert_from_hf(folder, tmp_path / "cast", dtype="bfloat16")["dtype"] == "bfloat16"
    written = json.loads((tmp_path / "cast/config.json").read_text())
    expected = config | {field: "bfloat16"}
    assert written == expected | {"llm_config": config["llm_config"] | {field: "bfloat16"}}
    assert load(tmp_path / "cast").params["visual_embedding"].dtype == "bfloat16"
    other = {"dtype": "torch_dtype", "torch_dtype": "dtype"}[field]
    path.write_text(json.dumps(config | {other: "bfloat16"}))
    with pytest.raises(
        ConfigError, match="torch_dtype is '.*' and dtype is '.*', expected a dtype"
    ):
        convert_from_hf(folder, tmp_path / "out")


def test_plan_reads_headers_only(tmp_path):
    folder = copy_golden("tiny-f32", tmp_path / "in")
    path = folder / "model.safetensors"
    start = min(info.start for info in read_header(path).tensors)
    size = path.stat().st_size
    os.truncate(path, start)
    os.truncate(path, size)
    assert len(plan_conversion(folder).tensors) == 85


def test_converted_folder_is_not_converted_again(tmp_path):
    convert_from_hf(GOLDEN / "tiny-f32", tmp_path / "a")
    with pytest.raises(OvisError, match="already converted"):
        convert_from_hf(tmp_path / "a", tmp_path / "b")


def test_only_required_files_of_a_repo_are_downloaded(tmp_path, monkeypatch):
    request = {}

    def snapshot_download(repo, *, revision, allow_patterns):
        request.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(tmp_path / "snapshots" / "abc123")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    found = resolve_checkpoint("some/model", "main")
    assert (found.name, found.revision, found.folder.name) == ("some/model", "abc123", "abc123")
    assert (request["repo"], request["revision"]) == ("some/model", "main")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(request["patterns"])
    assert not any(pattern in ("*", "*.py", "*.bin") for pattern in request["patterns"])


def test_untied_checkpoint(tmp_path):
    folder = copy_golden("tiny-f32", tmp_path / "in")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text.replace('"disable_tie_weight": false', '"disable_tie_weight": true')
    )
    with pytest.raises(CheckpointValidationError, match=r"llm\.lm_head\.weight: missing key"):
        convert_from_hf(folder, tmp_path / "out")
    head = np.random.default_rng(0).standard_normal((600, 64), np.float32)
    tensors = {**read_tensors(folder), "llm.lm_head.weight": head}
    save_file(tensors, folder / "model.safetensors")
    convert_from_hf(folder, tmp_path / "out")
    assert same_bits(read_tensors(tmp_path / "out")["decoder/unembed"], head)
