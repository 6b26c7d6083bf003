"""Every golden case, through the same comparison that `ovis-jax verify` prints."""

from pathlib import Path

import numpy as np
import pytest
from golden_copies import GOLDEN
from measured import record

from ovis_jax.errors import RequestError
from ovis_jax.verify import is_bfloat16, verify

CASES = sorted(path.relative_to(GOLDEN / "cases") for path in (GOLDEN / "cases").glob("*/*.npz"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden_case(case: Path, load_golden):
    golden = GOLDEN / "cases" / case
    dtype = "bfloat16" if is_bfloat16(golden) else "float32"
    ovis = load_golden(case.parent.name, dtype)
    stages = verify(ovis.processor, ovis.model, ovis.params, golden)
    for stage in stages:
        record(f"golden {dtype}: {stage.name}", stage.difference, stage.tolerance)
    wrong = [f"{s.name}: {s.difference:.2g} > {s.tolerance}" for s in stages if not s.passed]
    assert not wrong
    names = {stage.name for stage in stages}
    assert {"logits"} <= names
    if "batch" not in case.name:
        assert {"token ids", "block 0", "block 1", "block 2", "block 3"} <= names
    if dtype == "float32":
        assert any("greedy tokens" in name for name in names)
        if case.stem.partition(".")[0] not in ("text_only", "batch_leftpad"):
            assert {"vision features", "visual logits", "visual embeddings"} <= names


def test_all_cases_are_there():
    assert len(CASES) == 20


def test_all_tokens_are_decided(load_golden):
    """The margins of the golden files leave no greedy token open, so all 24 are compared."""
    ovis = load_golden("tiny-f32", "float32")
    golden = GOLDEN / "cases" / "tiny-f32" / "wide.npz"
    stages = verify(ovis.processor, ovis.model, ovis.params, golden)
    assert stages[-1].name == "24 greedy tokens"


@pytest.mark.parametrize("path", ["decoder/block_1/mlp/up", "vision/block_0/attn/v_bias"])
def test_a_wrong_weight_is_seen(path: str, load_golden, change_param):
    ovis = load_golden("tiny-f32", "float32")
    params = change_param(ovis.params, path, lambda w: w + 0.01)
    golden = GOLDEN / "cases" / "tiny-f32" / "tall.npz"
    failed = {s.name for s in verify(ovis.processor, ovis.model, params, golden) if not s.passed}
    first = "block 1" if path.startswith("decoder") else "vision features"
    assert first in failed and "logits" in failed
    assert not failed & {"token ids", "crops"}


def test_nan_fails(load_golden, change_param):
    ovis = load_golden("tiny-f32", "float32")
    params = change_param(ovis.params, "decoder/final_norm", lambda w: w * np.nan)
    golden = GOLDEN / "cases" / "tiny-f32" / "text_only.npz"
    failed = {s.name for s in verify(ovis.processor, ovis.model, params, golden) if not s.passed}
    assert "logits" in failed


def test_what_is_not_a_golden_file(load_golden, tmp_path):
    ovis = load_golden("tiny-f32", "float32")
    text = tmp_path / "a.npz"
    text.write_text("no archive")
    with pytest.raises(RequestError, match="cannot be read as an .npz file"):
        verify(ovis.processor, ovis.model, ovis.params, text)
    np.savez(text, other=np.zeros(3))
    with pytest.raises(RequestError, match="no field meta"):
        verify(ovis.processor, ovis.model, ovis.params, text)
    np.savez(text, meta=np.array("{"))
    with pytest.raises(RequestError, match="the field meta is not JSON"):
        verify(ovis.processor, ovis.model, ovis.params, text)
    text.write_bytes(b"")
    with pytest.raises(RequestError, match="cannot be read as an .npz file"):
        verify(ovis.processor, ovis.model, ovis.params, text)
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(RequestError, match="it holds a single array"):
        verify(ovis.processor, ovis.model, ovis.params, tmp_path / "a.npy")


def test_golden_file_that_lacks_something(load_golden, tmp_path):
    ovis = load_golden("tiny-f32", "float32")
    with np.load(GOLDEN / "cases" / "tiny-f32" / "text_only.npz") as file:
        fields = dict(file)
    cut = tmp_path / "cut.npz"
    np.savez(cut, **(fields | {"llm_blocks": fields["llm_blocks"][:-1]}))
    with pytest.raises(RequestError, match="results of 3 decoder blocks, the model has 4"):
        verify(ovis.processor, ovis.model, ovis.params, cut)
    del fields["logits"]
    np.savez(cut, **fields)
    with pytest.raises(RequestError, match="has no field logits"):
        verify(ovis.processor, ovis.model, ovis.params, cut)
