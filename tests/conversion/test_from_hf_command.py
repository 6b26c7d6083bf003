"""`python -m convert.from_hf` and `ovis-jax convert`, each in its own process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from golden_copies import GOLDEN, copy_golden, rewrite_shard, shard_with

from ovis_jax import presets
from ovis_jax.checkpoint.key_map import make_hub_key_map

ROOT = Path(__file__).parents[2]
CONFIG = presets.tiny()


MODULE = ("convert.from_hf",)
COMMAND = ("ovis_jax", "convert")


def run(
    cwd: Path, *arguments: str | Path, program: tuple[str, ...] = MODULE
) -> subprocess.CompletedProcess[str]:
    """Run a command in another working directory, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", *program, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_five_faults_at_once(tmp_path):
    folder = copy_golden("tiny-bf16-sharded", tmp_path / "broken")
    missing = "llm.model.layers.0.input_layernorm.weight"
    shape = "llm.model.norm.weight"
    dtype = "llm.model.layers.0.mlp.up_proj.weight"
    first = shard_with(folder, missing)
    rewrite_shard(
        first,
        {
            missing: None,
            "llm.model.surprise": np.zeros(3, ml_dtypes.bfloat16),
            dtype: np.zeros((128, 64), np.float32),
        },
    )
    rewrite_shard(shard_with(folder, shape), {shape: np.zeros(65, ml_dtypes.bfloat16)})
    last = shard_with(folder, "vte.weight")
    last.write_bytes(last.read_bytes()[:-1])
    result = run(tmp_path, folder, "out")
    assert result.returncode == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1
    assert "5 problems" in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("│")]
    assert len(lines) == 5
    for words in (
        (first.name, missing, "missing key", "[64] for decoder/block_0/pre_attn_norm"),
        (first.name, "llm.model.surprise", "unknown key", "BF16 [3]"),
        (first.name, dtype, "wrong dtype", "BF16", "F32"),
        (shard_with(folder, shape).name, shape, "wrong shape", "D = 64", "D = 65"),
        (last.name, "truncated file", f"{last.stat().st_size} bytes"),
    ):
        assert any(all(word in line for word in words) for line in lines), (words, lines)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.slow
def test_convert(tmp_path):
    result = run(tmp_path, GOLDEN / "tiny-f32", "deep/out", "--dtype", "float16")
    assert (result.returncode, result.stderr) == (0, "")
    assert "98 source keys" in result.stdout
    assert json.loads((tmp_path / "deep/out/conversion.json").read_text())["dtype"] == "float16"
    again = run(tmp_path, GOLDEN / "tiny-f32", "deep/out")
    assert again.returncode == 2
    assert "exists and is not an empty folder" in again.stderr


@pytest.mark.slow
def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    result = run(tmp_path, GOLDEN / "tiny-bf16-sharded", "out", "--dry-run")
    assert (result.returncode, result.stderr) == (0, "")
    assert not list(tmp_path.iterdir())
    keys = make_hub_key_map(CONFIG)
    rows = {line.split()[1]: line for line in result.stdout.splitlines() if line.startswith("│")}
    assert rows.keys() == keys.parameters.keys() | keys.unused.keys()
    assert all(path in rows[key] for key, path in keys.parameters.items())
    assert all(why in rows[key] for key, why in keys.unused.items())
    assert "[69, 64]" in rows["vte.weight"]
    assert "BF16" in rows["vte.weight"]
    assert "98 source keys, 13 of them not used; 85 parameters" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere", "out"], 2, "neither a folder nor a repo id"),
        (["no-one/nothing", "out"], 3, "there is no such folder, and as a repo id"),
        ([".", "out"], 1, "config.json does not exist"),
        (
            [GOLDEN / "tiny-f32", "out", "--revision", "main"],
            2,
            "is a folder, which has no revision",
        ),
        (
            ["ovis-tiny", "out", "--revision", "main"],
            2,
            "ovis-tiny is a bundled checkpoint, which has",
        ),
        (["ovis-tiny", "out", "--verify"], 2, "checksums of the bundled checkpoint ovis-tiny are"),
        (["ovis-tiny", "out", "--delete-source-shards"], 2, "ovis-tiny is the bundled checkpoint"),
        ([GOLDEN / "tiny-f32", "out", "--dtype", "int8"], 2, "int8"),
        ([GOLDEN / "tiny-f32"], 2, "Missing argument"),
    ],
)
def test_exit_codes(tmp_path, arguments, code, message):
    result = run(tmp_path, *arguments)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_invalid_config(tmp_path):
    config = copy_golden("tiny-f32", tmp_path / "in") / "config.json"
    for text in ("{", config.read_text().replace('"multimodal_max_length"', '"x"')):
        config.write_text(text)
        result = run(tmp_path, "in", "out")
        assert result.returncode == 1 and "config.json" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_in_the_middle(tmp_path, stop):
    # The command sends the signal to itself between two tensors.
    code = (
        "import os, signal, sys, typer\n"
        "from ovis_jax.conversion import from_hf, tensor_chunks\n"
        # A shell starts background jobs with SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "original = tensor_chunks.read_chunks\n"
        "def read_chunks(info):\n"
        "    if info.key == 'vte.weight':\n"
        f"        os.kill(os.getpid(), {int(stop)})\n"
        "    yield from original(info)\n"
        "tensor_chunks.read_chunks = read_chunks\n"
        f"sys.argv = ['convert', {str(GOLDEN / 'tiny-f32')!r}, 'out']\n"
        "typer.run(from_hf.convert)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    if stop == signal.SIGKILL:
        assert result.returncode == -signal.SIGKILL
    else:
        assert result.returncode == 4
        message = "interrupted; out was not written; the same command resumes"
        assert message in result.stderr.replace("\n", " ")


@pytest.mark.slow
def test_bundled_checkpoint_in_a_folder_with_a_convert_module(tmp_path):
    """The user's convert.py would shadow the package of `python -m convert.from_hf`."""
    (tmp_path / "convert.py").write_text("raise SystemExit('the wrong module')")
    result = run(tmp_path, "ovis-tiny", "out", program=COMMAND)
    assert (result.returncode, result.stderr) == (0, "")
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    assert record["source"] == {"name": "ovis-tiny", "revision": None}
    assert result.stdout.startswith("out: ") and result.stdout.endswith(" in 1 shard\n")


@pytest.mark.exhaustive
def test_folder_with_the_name_of_the_bundled_checkpoint(tmp_path):
    folder = tmp_path / "ovis-tiny"
    folder.mkdir()
    result = run(tmp_path, "ovis-tiny", "out")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert (
        "ovis-tiny is a folder here, without config.json, which hides the bundled" in result.stderr
    )
    assert run(tmp_path.parent, "ovis-tiny", folder).returncode == 0
    result = run(tmp_path, "ovis-tiny", "out")
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert (
        "the folder ovis-tiny is already converted; give the checkpoint that it was"
        in result.stderr
    )
    assert "it hides the bundled checkpoint ovis-tiny" in result.stderr
