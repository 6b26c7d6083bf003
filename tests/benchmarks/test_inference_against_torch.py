"""The comparison with PyTorch on a shallow model: its output, not its speed."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from shallow import shallow_config

from benchmarks.support.random_checkpoints import write_random_checkpoints
from benchmarks.support.torch_comparison import STAGES, TorchComparison
from benchmarks.support.transformers_ovis import TransformersOvis
from ovis_jax import load

pytestmark = [pytest.mark.torch, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SMALL = ["--length", "20", "--batch", "2", "--crops", "1"]


@pytest.mark.exhaustive
def test_every_stage_in_both_dtypes(shallow_checkpoint, tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.inference_against_torch",
        "--model",
        shallow_checkpoint,
    ]
    command += [*SMALL, "--repeats", "1", "--new-tokens", "4", "--threads", "1"]
    command += ["--json", str(tmp_path / "results.json"), "--plot", str(tmp_path / "plot.png")]
    subprocess.run(command, cwd=ROOT, check=True)
    found = json.loads((tmp_path / "results.json").read_text())
    rows = {(r["stage"], r["dtype"], r["batch"], r["positions"]): r for r in found["rows"]}
    assert len(rows) == len(found["rows"])
    seen = {key[:2] for key in rows}
    assert seen == set(product(STAGES, ("float32", "bfloat16")))
    for row in rows.values():
        assert 0 < row["ratio_lowest"] <= row["ratio"] <= row["ratio_highest"]
        assert row["ratio"] == pytest.approx(row["torch"]["median"] / row["ours"]["median"])
        assert row["min_seconds"] > 0
        assert row["stage"] != "decode" or row["torch_cache"] in ("dynamic", "static")
    assert found["machine"]["logits_apart"] < 1e-4 and found["machine"]["threads"] == 1
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    target = tmp_path_factory.mktemp("made")
    folder = write_random_checkpoints(shallow_config(), target, ["float32"])["float32"]
    torch_side = TransformersOvis(folder, "float32", threads=1)
    return TorchComparison(folder, folder, "float32", 1, 1, load(folder), torch_side, 4)


def test_both_sides_agree(comparison):
    assert comparison.check_agreement() < 1e-4


def test_sides_that_differ_are_not_timed(comparison, change_param):
    params = change_param(
        comparison.jax_side.params, "decoder/block_1/post_mlp_norm", lambda w: w + 0.01
    )
    changed = replace(comparison, jax_side=replace(comparison.jax_side, params=params))
    with pytest.raises(SystemExit, match="the two sides disagree: logits"):
        changed.check_agreement()


def test_both_torch_caches_give_the_same_tokens(comparison):
    tokens = np.random.default_rng(0).integers(108, 600, (2, 30))
    none = np.zeros(0)
    dynamic, static = (
        comparison.torch_side.generate(tokens, none, k, 4) for k in ("dynamic", "static")
    )
    assert dynamic.tolist() == static.tolist()
