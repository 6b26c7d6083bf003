"""Checkpoints with random weights, and the benchmark of conversion."""

import json
from dataclasses import replace

import pytest
from golden_copies import read_files, read_tensors
from shallow import shallow_config

from benchmarks import conversion
from benchmarks.make_checkpoint import list_published_tensors, write_random_checkpoint
from ovis_jax import load, presets
from ovis_jax.checkpoint.safetensors_writer import count_bytes, plan_shards


def test_9b_shards_are_as_published():
    tensors = list_published_tensors(presets.ovis1_6_gemma2_9b())
    assert len(tensors) == 916
    shards = plan_shards(tensors).values()
    sizes = [sum(count_bytes(*tensors[key]) for key in keys) for keys in shards]
    assert [round(size / 1e9, 2) for size in sizes] == [4.90, 4.95, 4.96, 4.53, 1.07]


@pytest.mark.slow
def test_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_random_checkpoint(shallow_config(), tmp_path / name, seed, max_shard_bytes=200_000)
    a, b, c = (read_files(tmp_path / name) for name in "abc")
    assert a == b and a != c and len([name for name in a if name.startswith("model-")]) > 1
    assert load(tmp_path / "a").config == shallow_config()
    assert all(
        0 < abs(x.astype("float32")).max() < 1 for x in read_tensors(tmp_path / "a").values()
    )


@pytest.mark.exhaustive
def test_benchmark(tmp_path):
    shallow = shallow_config()
    # 128 MB, so that it can be killed while it is written.
    large = replace(shallow, decoder=replace(shallow.decoder, vocab_size=1_000_000))
    write_random_checkpoint(large, tmp_path / "source")
    conversion.main(tmp_path / "source", folder=tmp_path, output=tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine"]["differing_tensors"] == []
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == 9 and all(row["seconds"] > 0 for row in rows.values())
    assert rows["from_hf, second"]["peak_bytes"] > 2**26
    assert found["machine"]["speed_relative_to_cp"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "found.json"}


@pytest.mark.slow
def test_differing_tensors(tmp_path):
    for seed in (0, 1):
        write_random_checkpoint(shallow_config(), tmp_path / str(seed), seed)
    assert len(conversion.find_differing_tensors(tmp_path / "0", tmp_path / "1")) == len(
        list_published_tensors(shallow_config())
    )
    assert conversion.find_differing_tensors(tmp_path / "0", tmp_path / "0") == []


def test_command_that_ends_before_it_is_killed(tmp_path):
    with pytest.raises(SystemExit, match="ended before it could be killed"):
        conversion.run_until_killed(["true"], tmp_path / "none", 1)
