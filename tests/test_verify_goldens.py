"""Every golden file, through the comparison that `ovis-jax verify` prints."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from golden_copies import GOLDEN, GOLDEN_LLAMA
from measured import record

from ovis_jax.errors import RequestError
from ovis_jax.inputs.batch import pad_batch
from ovis_jax.inputs.image_processing import IMAGE_SLOT
from ovis_jax.inputs.open_image import open_image
from ovis_jax.loading import load
from ovis_jax.model.ovis import forward
from ovis_jax.verify_goldens import GoldenFile, compare_with_golden

pytestmark = pytest.mark.optimized

TESTS = Path(__file__).parent
CASES = sorted(
    path.relative_to(TESTS)
    for folder in (GOLDEN, GOLDEN_LLAMA)
    for path in (folder / "cases").glob("*/*.npz")
)


@pytest.fixture
def ovis(load_golden):
    return load_golden("tiny-f32", "float32")


def compare(ovis, path: Path):
    return compare_with_golden(ovis, GoldenFile(path))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden_file(case: Path, load_golden):
    golden = GoldenFile(TESTS / case)
    dtype = golden.dtype
    checkpoint = TESTS / case.parts[0] / case.parent.name
    stages = compare_with_golden(load_golden(checkpoint, dtype), golden)
    for stage in stages:
        record(f"golden {dtype}: {stage.name}", stage.difference, stage.tolerance)
    assert not [f"{s.name}: {s.difference:.2g} > {s.tolerance}" for s in stages if not s.passed]
    names = {stage.name for stage in stages}
    assert "logits" in names
    if "batch" not in case.name:
        assert {"token ids", "block 0", "block 1", "block 2", "block 3"} <= names
    if dtype == "float32":
        assert any("greedy tokens" in name for name in names)
        if case.stem.partition(".")[0] not in ("text_only", "unicode", "batch_leftpad"):
            assert {"vision features", "visual logits", "visual embeddings"} <= names


def test_number_of_golden_files():
    assert len(CASES) == 20 + 8


@pytest.mark.slow
def test_all_greedy_tokens_are_compared(ovis):
    """All margins of this file are above the tolerance."""
    assert compare(ovis, GOLDEN / "cases/tiny-f32/wide.npz")[-1].name == "24 greedy tokens"


@pytest.mark.parametrize("path", ["decoder/block_1/mlp/up", "vision/block_0/attn/v_bias"])
def test_a_wrong_weight_fails(path: str, ovis, change_param):
    params = change_param(ovis.params, path, lambda w: w + 0.01)
    stages = compare(replace(ovis, params=params), GOLDEN / "cases/tiny-f32/tall.npz")
    failed = {stage.name for stage in stages if not stage.passed}
    first = "block 1" if path.startswith("decoder") else "vision features"
    assert first in failed and "logits" in failed
    assert not failed & {"token ids", "crops"}


@pytest.mark.slow
def test_nan_fails(ovis, change_param):
    params = change_param(ovis.params, "decoder/final_norm", lambda w: w * np.nan)
    stages = compare(replace(ovis, params=params), GOLDEN / "cases/tiny-f32/text_only.npz")
    assert "logits" in {stage.name for stage in stages if not stage.passed}


def test_other_files(tmp_path):
    path = tmp_path / "a.npz"

    def error_of(path: Path) -> str:
        with pytest.raises(RequestError) as raised:
            GoldenFile(path)
        return str(raised.value)

    assert (
        error_of(tmp_path) == f"{tmp_path} is a folder; pass golden files, such as {tmp_path}/*.npz"
    )
    assert error_of(path).startswith(f"{path} does not exist; pass golden files")
    for content in (b"# A README", b""):
        path.write_bytes(content)
        assert error_of(path).startswith(f"{path} is not an .npz file; pass golden files")
    np.savez(path, other=np.zeros(3))
    assert error_of(path) == f"{path} has no field meta, so it is not a golden file"
    np.savez(path, meta=np.array("{"))
    assert error_of(path).startswith(f"{path} is damaged or not a golden file: ")
    np.savez(path, meta=np.array('{"text": "Hi"}'))
    assert f"{path}: the field meta has text, expected rows, or text, images and" in error_of(path)
    golden = (GOLDEN / "cases/tiny-f32/text_only.npz").read_bytes()
    path.write_bytes(golden[:500] + bytes(9) + golden[509:])
    assert error_of(path).startswith(f"{path} is damaged or not a golden file: ")


def test_golden_of_another_model():
    path = GOLDEN / "cases/tiny-f32/wide.npz"
    with pytest.raises(RequestError) as raised:
        compare(load("ovis-tiny"), path)
    message = str(raised.value)
    assert message.startswith(
        f"{path} has results from a different model: the decoder width is 64 in"
    )
    for difference in (
        "the decoder width is 64 in the file and 128 in the checkpoint",
        "the vocabulary size is 600 in the file and 1024 in the checkpoint",
        "the image size is 70 in the file and 84 in the checkpoint",
        "the number of visual words is 64 in the file and 251 in the checkpoint",
    ):
        assert difference in message
    assert "depth" not in message


def test_incomplete_golden_files(ovis, tmp_path):
    fields = GoldenFile(GOLDEN / "cases/tiny-f32/text_only.npz")
    path = tmp_path / "cut.npz"
    np.savez(path, **(fields | {"llm_blocks": fields["llm_blocks"][:-1]}))
    with pytest.raises(RequestError, match="the decoder depth is 3 in the file and 4 in the check"):
        compare(ovis, path)
    del fields["logits"]
    np.savez(path, **fields)
    with pytest.raises(RequestError, match=r"cut\.npz has no field logits"):
        compare(ovis, path)
    np.savez(path, **fields | {"input_ids": np.array([2, 700])})
    with pytest.raises(RequestError, match=r"cut\.npz: .*700"):
        compare(ovis, path)


def test_missing_files_of_a_golden(ovis, tmp_path):
    """The message names the golden file, and the file that it needs."""
    path = tmp_path / "batch.npz"
    path.write_bytes((GOLDEN / "cases/tiny-f32/batch_leftpad.npz").read_bytes())
    with pytest.raises(RequestError, match=r"batch\.npz: .*rgba\.npz does not exist"):
        compare(ovis, path)
    path.write_bytes((GOLDEN / "cases/tiny-f32/wide.npz").read_bytes())
    with pytest.raises(RequestError, match=r"batch\.npz needs the file images/wide\.png"):
        compare(ovis, path)


@pytest.fixture(scope="module")
def tiny_goldens(tmp_path_factory) -> Path:
    """Results of ovis-tiny in float32 as golden files: in float32, in bfloat16, and as a batch."""
    folder = tmp_path_factory.mktemp("goldens")
    (folder / "images").mkdir()
    image = shutil.copy(TESTS.parent / "examples/shapes.png", folder / "images")
    ovis, text = load("ovis-tiny", dtype="float32"), "<image>\nWhat colour is the diamond?"
    inputs = ovis.processor([text], [[open_image(image)]], max_partition=1)
    prompt = inputs.tokens[0][inputs.positions[0] >= 0]
    answer = np.array(ovis.processor.tokenizer.encode("The diamond is orange."))
    batch = pad_batch([np.concatenate([prompt, answer])], inputs.pixels, ovis.config)
    logits = np.asarray(forward(ovis.model, ovis.params, batch))[0]
    top_two = np.sort(logits[len(prompt) - 1 :][: len(answer)], axis=-1)[:, -2:]
    slots = np.flatnonzero(prompt == IMAGE_SLOT)
    fields = {
        "input_ids": np.delete(prompt, slots[1:]),  # the original has one id per crop
        "merged_mask": np.ones(len(prompt), bool),
        "logits": logits[: len(prompt)],
        "gen_tokens": answer,
        "gen_margins": top_two[:, 1] - top_two[:, 0],
    }
    meta = {"text": text, "images": ["shapes.png"], "max_partition": 1}
    pixels = {"pixel_values": inputs.pixels[:1].transpose(0, 3, 1, 2)}
    np.savez(folder / "float32.npz", **fields, **pixels, meta=json.dumps(meta))
    np.savez(folder / "bfloat16.npz", **fields, meta=json.dumps(meta | {"compute": "bf16"}))
    rows = {name: np.stack([field] * 2) for name, field in fields.items() if name != "logits"}
    rows |= {
        "attention_mask": rows["input_ids"] != 0,
        "first_logits": logits[[len(prompt) - 1] * 2],
    }
    meta = {"rows": ["float32", "float32"]}
    np.savez(folder / "batch.npz", **rows, meta=json.dumps(meta))
    return folder


@pytest.mark.exhaustive
@pytest.mark.parametrize(("quantization", "rounding"), [("int8", 0.003), ("int4", 0.05)])
def test_a_quantized_model_is_compared_by_its_distributions(
    quantization, rounding, tiny_goldens, change_param
):
    """Rounding passes with room, and a mistake in one matrix fails."""
    ovis = load("ovis-tiny", dtype="float32", quantization=quantization)
    names = ["KL divergence", "share of 5 tokens that differ"]
    stages = compare(ovis, tiny_goldens / "float32.npz")
    assert [stage.name for stage in stages] == ["token ids", "crops", *names]
    assert all(stage.passed for stage in stages)
    divergence = stages[2].difference
    assert 1e-4 < divergence < rounding
    (_, found, _) = compare(ovis, tiny_goldens / "bfloat16.npz")
    assert found.difference == divergence
    for path, mistake in (
        ("decoder/embed", lambda w: replace(w, scale=2 * w.scale)),
        ("decoder/block_1/mlp/up", lambda w: replace(w, q=jnp.roll(w.q, 1, axis=-2))),
    ):
        wrong = replace(ovis, params=change_param(ovis.params, path, mistake))
        found = {stage.name: stage for stage in compare(wrong, tiny_goldens / "float32.npz")}
        assert not found["KL divergence"].passed
    if quantization == "int8":
        stages = compare(ovis, tiny_goldens / "batch.npz")
        assert [stage.name for stage in stages] == [
            names[0],
            "share of 10 tokens that differ",
        ]
        assert all(stage.passed for stage in stages)


def test_gptq_compared_with_the_checkpoint_before_gptq():
    """Results with its own dequantized weights are compared strictly, in test_gptq.py."""
    path = GOLDEN / "cases/tiny-f32/text_only.npz"
    stages = compare(load(TESTS / "golden-gptq/tiny-gptq-int4", dtype="float32"), path)
    assert {"KL divergence": 0.5} == {s.name: s.tolerance for s in stages if s.name[:2] == "KL"}
    assert "logits" not in {stage.name for stage in stages}
