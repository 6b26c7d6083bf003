"""The benchmark beside PyTorch, on a shallow model: what it writes, not how fast anything is."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from shallow import shallow_config

from benchmarks import floors
from benchmarks.checkpoints import make
from benchmarks.torch_cases import STAGES, Bench
from benchmarks.torch_side import TorchSide
from ovis_jax import load, presets
from ovis_jax.sharding import param_shapes

ROOT = Path(__file__).parents[2]
SMALL = ["--length", "20", "--batch", "2", "--crops", "1"]


def test_every_stage_in_both_dtypes(shallow_checkpoint, tmp_path):
    command = [sys.executable, "-m", "benchmarks.against_torch", "--model", shallow_checkpoint]
    command += [*SMALL, "--repeats", "1", "--new-tokens", "4", "--threads", "1"]
    command += ["--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "found.png")]
    subprocess.run(command, cwd=ROOT, check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {(r["stage"], r["dtype"], r["batch"], r["positions"]): r for r in found["rows"]}
    assert len(rows) == len(found["rows"])
    seen = {key[:2] for key in rows}
    assert seen == set(product(STAGES, ("float32", "bfloat16")))
    for row in rows.values():
        assert 0 < row["ratio_lowest"] <= row["ratio"] <= row["ratio_highest"]
        assert row["ratio"] == pytest.approx(row["torch"]["median"] / row["ours"]["median"])
        assert row["floor_seconds"] > 0
        assert row["stage"] != "decode" or row["torch_cache"] in ("dynamic", "static")
    assert found["machine"]["logits_apart"] < 1e-4 and found["machine"]["threads"] == 1
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = make(shallow_config(), tmp_path_factory.mktemp("made"), ["float32"])["float32"]
    theirs = TorchSide(folder, "float32", threads=1)
    return Bench(folder, folder, "float32", 1, 1, load(folder), theirs, 4)


def test_both_sides_agree(bench):
    assert bench.check() < 1e-4


def test_sides_that_differ_are_not_timed(bench, change_param):
    params = change_param(bench.ours.params, "decoder/block_1/post_mlp_norm", lambda w: w + 0.01)
    spoilt = replace(bench, ours=replace(bench.ours, params=params))
    with pytest.raises(SystemExit, match="the two sides disagree: logits"):
        spoilt.check()


def test_the_cache_of_either_kind_gives_the_same_tokens(bench):
    tokens = np.random.default_rng(0).integers(108, 600, (2, 30))
    none = np.zeros(0)
    dynamic, static = (bench.theirs.generate(tokens, none, k, 4) for k in ("dynamic", "static"))
    assert dynamic.tolist() == static.tolist()


def test_floors_count_every_matrix_once():
    config = presets.bench()
    shapes = param_shapes(config)
    decoder = [s for path, s in shapes.items() if path.startswith("decoder/") and len(s) == 2]
    weights = sum(int(np.prod(s)) for s in decoder)
    work = floors.decode(config, rows=1, length=0, itemsize=2)
    assert work.bytes == 2 * weights and work.flops == 2 * weights
    seen = [s for path, s in shapes.items() if path.startswith("vision/block") and len(s) == 2]
    patch = shapes["vision/patch"]
    weights = sum(int(np.prod(s)) for s in [*seen, patch])
    assert floors.vision(config, 1, itemsize=4).bytes == 4 * weights
    assert floors.prefill(config, 2, 9, 4).flops == 2 * floors.prefill(config, 1, 9, 4).flops
    assert jnp.isclose(floors.Work(30.0, 2.0).seconds(bandwidth=1.0, flop_rate=10.0), 3.0)
