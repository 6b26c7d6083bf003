"""`python -m convert.to_hf` and the command `export`."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from golden_copies import GOLDEN, copy_golden, read_tensors, rewrite_shard, same_bits, shard_with

from ovis_jax.checkpoint import output_dirs
from ovis_jax.conversion.from_hf import convert_from_hf

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
PROBE = "visual_tokenizer.backbone.vision_model.head.probe"


def run(cwd: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in another working directory, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "convert.to_hf", *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_round_trip(converted, tmp_path):
    golden = GOLDEN / "tiny-bf16-sharded"
    result = run(tmp_path, converted[golden.name], "deep/out", "--source", golden)
    assert (result.returncode, result.stderr) == (0, "")
    summary = f"98 tensors; tensors that the model never uses: 13 copied from {golden}"
    assert result.stdout == f"deep/out: {summary}\n"
    found, expected = read_tensors(tmp_path / "deep/out"), read_tensors(golden)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[key], expected[key]) for key in found)


def test_without_a_source(converted, tmp_path, export):
    result = export(converted["tiny-f32"], "out")
    assert (result.exit_code, result.stderr) == (0, "")
    unused = "tensors that the model never uses: 13 written as zeros"
    assert result.stdout == f"out: 98 tensors; {unused}\n"
    again = export(converted["tiny-f32"], "out")
    assert (again.exit_code, again.stdout) == (2, "")
    assert "out exists and is not an empty folder" in again.stderr


def test_source_that_lacks_a_tensor(converted, tmp_path, export):
    source = copy_golden("tiny-f32", tmp_path / "source")
    rewrite_shard(source / "model.safetensors", {PROBE: None})
    result = export(converted["tiny-f32"], "out", "--source", "source")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "--source source: 1 problem" in result.stderr
    assert PROBE in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "nowhere is not a folder"),
        ([GOLDEN / "tiny-f32", "out"], "has no conversion.json"),
        (["ovis-tiny", "out"], "the bundled checkpoint ovis-tiny has no conversion.json"),
        ([GOLDEN / "tiny-f32", "out", "--dtype", "int8"], "int8"),
        ([GOLDEN / "tiny-f32"], "Missing argument"),
    ],
)
def test_usage(tmp_path, export, arguments, message):
    result = export(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_full_disk(converted, tmp_path, export, monkeypatch):
    monkeypatch.setattr(output_dirs.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    result = export(converted["tiny-f32"], "out")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "GB are needed" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_faults_are_reported_in_a_table(tmp_path):
    convert_from_hf(GOLDEN / "tiny-f32", tmp_path / "broken")
    shard = shard_with(tmp_path / "broken", "visual_embedding")
    rewrite_shard(
        shard,
        {
            "visual_embedding": None,
            "surprise": np.zeros(3, np.float32),
            "decoder/final_norm": np.zeros(65, np.float32),
        },
    )
    result = run(tmp_path, "broken", "out")
    assert (result.returncode, result.stdout) == (1, "")
    assert "3 problems" in result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("│")]
    for words in (
        ("visual_embedding", "missing key"),
        ("surprise", "unknown key"),
        ("decoder/final_norm", "wrong shape", "D = 64", "D = 65"),
    ):
        assert any(all(word in line for word in words) for line in lines), (words, lines)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_in_the_middle(converted, tmp_path, stop):
    # The command sends the signal to itself between two tensors.
    code = (
        "import os, sys, typer\n"
        "from ovis_jax.conversion import tensor_chunks, to_hf\n"
        "original = tensor_chunks.read_chunks\n"
        "def read_chunks(info):\n"
        "    if info.key == 'visual_embedding':\n"
        f"        os.kill(os.getpid(), {int(stop)})\n"
        "    yield from original(info)\n"
        "tensor_chunks.read_chunks = read_chunks\n"
        f"sys.argv = ['export', {str(converted['tiny-f32'])!r}, 'out']\n"
        "typer.run(to_hf.export)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    if stop == signal.SIGKILL:
        assert result.returncode == -signal.SIGKILL
    else:
        assert result.returncode == 4
        message = "interrupted; out was not written; the same command resumes"
        assert message in result.stderr.replace("\n", " ")
