"""Every golden file, through the comparison that `ovis-jax verify` prints."""

from pathlib import Path

import numpy as np
import pytest
from golden_copies import GOLDEN
from measured import record

from ovis_jax.errors import RequestError
from ovis_jax.verify_goldens import compare_with_golden, is_bfloat16_golden

pytestmark = pytest.mark.optimized

CASES = sorted(path.relative_to(GOLDEN / "cases") for path in (GOLDEN / "cases").glob("*/*.npz"))


@pytest.fixture
def ovis(load_golden):
    return load_golden("tiny-f32", "float32")


def compare(ovis, path: Path, params=None):
    return compare_with_golden(ovis.processor, ovis.model, params or ovis.params, path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden_file(case: Path, load_golden):
    path = GOLDEN / "cases" / case
    dtype = "bfloat16" if is_bfloat16_golden(path) else "float32"
    stages = compare(load_golden(case.parent.name, dtype), path)
    for stage in stages:
        record(f"golden {dtype}: {stage.name}", stage.difference, stage.tolerance)
    assert not [f"{s.name}: {s.difference:.2g} > {s.tolerance}" for s in stages if not s.passed]
    names = {stage.name for stage in stages}
    assert "logits" in names
    if "batch" not in case.name:
        assert {"token ids", "block 0", "block 1", "block 2", "block 3"} <= names
    if dtype == "float32":
        assert any("greedy tokens" in name for name in names)
        if case.stem.partition(".")[0] not in ("text_only", "batch_leftpad"):
            assert {"vision features", "visual logits", "visual embeddings"} <= names


def test_number_of_golden_files():
    assert len(CASES) == 20


@pytest.mark.slow
def test_all_greedy_tokens_are_compared(ovis):
    """All margins of this file are above the tolerance."""
    assert compare(ovis, GOLDEN / "cases/tiny-f32/wide.npz")[-1].name == "24 greedy tokens"


@pytest.mark.parametrize("path", ["decoder/block_1/mlp/up", "vision/block_0/attn/v_bias"])
def test_a_wrong_weight_fails(path: str, ovis, change_param):
    params = change_param(ovis.params, path, lambda w: w + 0.01)
    stages = compare(ovis, GOLDEN / "cases/tiny-f32/tall.npz", params)
    failed = {stage.name for stage in stages if not stage.passed}
    first = "block 1" if path.startswith("decoder") else "vision features"
    assert first in failed and "logits" in failed
    assert not failed & {"token ids", "crops"}


@pytest.mark.slow
def test_nan_fails(ovis, change_param):
    params = change_param(ovis.params, "decoder/final_norm", lambda w: w * np.nan)
    stages = compare(ovis, GOLDEN / "cases/tiny-f32/text_only.npz", params)
    assert "logits" in {stage.name for stage in stages if not stage.passed}


def test_other_files(ovis, tmp_path):
    path = tmp_path / "a.npz"
    for content in (b"no archive", b""):
        path.write_bytes(content)
        with pytest.raises(RequestError, match=r"a\.npz cannot be read as an \.npz file"):
            compare(ovis, path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(RequestError, match=r"a\.npz has no field meta"):
        compare(ovis, path)
    np.savez(path, meta=np.array("{"))
    with pytest.raises(RequestError, match="the field meta is not JSON"):
        compare(ovis, path)
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(RequestError, match=r"a\.npy .*it holds a single array"):
        compare(ovis, tmp_path / "a.npy")


def test_incomplete_golden_files(ovis, tmp_path):
    with np.load(GOLDEN / "cases/tiny-f32/text_only.npz") as file:
        fields = dict(file)
    path = tmp_path / "cut.npz"
    np.savez(path, **(fields | {"llm_blocks": fields["llm_blocks"][:-1]}))
    with pytest.raises(RequestError, match="results of 3 decoder blocks, the model has 4"):
        compare(ovis, path)
    del fields["logits"]
    np.savez(path, **fields)
    with pytest.raises(RequestError, match="has no field logits"):
        compare(ovis, path)
