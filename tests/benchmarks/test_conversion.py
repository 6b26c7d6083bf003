"""Checkpoints of the real layout, and what the benchmark of conversions writes."""

import json
from dataclasses import replace

import pytest
from golden_copies import read_files, read_tensors
from shallow import shallow_config

from benchmarks import conversion
from benchmarks.make_checkpoint import hub_tensors, make
from ovis_jax import load, presets
from ovis_jax.checkpoint.writer import plan_shards, tensor_bytes


def test_the_9b_is_cut_as_published():
    tensors = hub_tensors(presets.ovis1_6_gemma2_9b())
    assert len(tensors) == 916
    shards = plan_shards(tensors).values()
    sizes = [sum(tensor_bytes(*tensors[key]) for key in keys) for keys in shards]
    assert [round(size / 1e9, 2) for size in sizes] == [4.90, 4.95, 4.96, 4.53, 1.07]


def test_a_seed_makes_the_same_bytes_and_they_load(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(shallow_config(), tmp_path / name, seed, max_shard_bytes=200_000)
    a, b, c = (read_files(tmp_path / name) for name in "abc")
    assert a == b and a != c and len([name for name in a if name.startswith("model-")]) > 1
    assert load(tmp_path / "a").config == shallow_config()
    assert all(
        0 < abs(x.astype("float32")).max() < 1 for x in read_tensors(tmp_path / "a").values()
    )


def test_there_and_back(tmp_path):
    shallow = shallow_config()
    # 128 MB, so that it can be killed while it is being written.
    large = replace(shallow, decoder=replace(shallow.decoder, vocab_size=1_000_000))
    make(large, tmp_path / "source")
    conversion.main(tmp_path / "source", folder=tmp_path, output=tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine"]["tensors_that_differ"] == []
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == 9 and all(row["seconds"] > 0 for row in rows.values())
    assert rows["from_hf, second"]["peak_bytes"] > 2**26
    assert found["machine"]["of_the_speed_of_cp"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "found.json"}


def test_a_difference_is_seen(tmp_path):
    for seed in (0, 1):
        make(shallow_config(), tmp_path / str(seed), seed)
    assert len(conversion.differing(tmp_path / "0", tmp_path / "1")) == len(
        hub_tensors(shallow_config())
    )
    assert conversion.differing(tmp_path / "0", tmp_path / "0") == []


def test_ended_before_it_is_killed(tmp_path):
    with pytest.raises(SystemExit, match="ended before it could be killed"):
        conversion.run_killed(["true"], tmp_path / "none", 1)
