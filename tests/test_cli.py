"""The command line as users run it: as a separate process, in another folder."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from golden_copies import GOLDEN, copy_golden
from PIL import Image
from typer.testing import CliRunner

import ovis_jax
from ovis_jax.cli import app
from ovis_jax.console import exit_on_error, interrupt_on_sigterm
from ovis_jax.errors import OvisError

ROOT = Path(__file__).parents[1]
MODEL = str(GOLDEN / "tiny-f32")
WIDE = str(GOLDEN / "images" / "wide.png")


def run(
    *arguments: object, cwd: Path, text: str | None = None, **variables: str
) -> subprocess.CompletedProcess:
    """Run `ovis-jax` with arguments and environment variables."""
    command = [sys.executable, "-W", "error", "-m", "ovis_jax", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    # All tests of a run share one compilation cache.
    environment |= {"XDG_CACHE_HOME": str(cwd.parent / "cache"), **variables}
    return subprocess.run(
        command, cwd=cwd, env=environment, input=text, capture_output=True, text=True, timeout=300
    )


def run_invalid(*arguments: object, cwd: Path, code: int = 2, **variables: str) -> str:
    """Run a command that fails, and return its one-line error."""
    result = run(*arguments, cwd=cwd, **variables)
    assert result.returncode == code, result
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.slow
def test_generate_prints_the_original_text(tmp_path):
    case = np.load(GOLDEN / "cases" / "tiny-f32" / "wide.npz")
    meta = json.loads(str(case["meta"]))
    arguments = ["generate", "--model", MODEL, "--image", WIDE, "--prompt", meta["text"]]
    result = run(*arguments, "--max-new-tokens", 24, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == str(case["original_generate_text"]) + "\n"
    result = run(*arguments, "--max-new-tokens", 24, "--json", cwd=tmp_path)
    answer = json.loads(result.stdout)
    assert answer["tokens"] == case["original_generate_tokens"].tolist()
    assert answer["text"] == str(case["original_generate_text"])
    assert answer["finish_reason"] == "length"
    assert answer["prompt_positions"] == len(case["merged_mask"])


@pytest.mark.exhaustive
def test_tensor_parallel(tmp_path):
    """The processes under test have eight devices."""
    golden = GOLDEN / "cases" / "tiny-f32" / "wide.npz"
    case = np.load(golden)
    text = json.loads(str(case["meta"]))["text"]
    ask = ["generate", "--model", MODEL, "--image", WIDE, "--prompt", text, "--max-new-tokens", 24]
    result = run(*ask, "--tensor-parallel", 2, cwd=tmp_path)
    assert result.stdout == str(case["original_generate_text"]) + "\n", result.stderr
    message = run_invalid(*ask, "--tensor-parallel", 16, cwd=tmp_path)
    assert "16 devices" in message and "has 8" in message
    assert "letter A has size 4" in run_invalid(*ask, "--tensor-parallel", 8, cwd=tmp_path)
    result = run("verify", MODEL, golden, "--tensor-parallel", 2, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.exhaustive
def test_sampling_depends_on_the_seed(tmp_path):
    def answer(seed: int) -> list[int]:
        options = ["--temperature", 2.0, "--top-p", 0.95, "--top-k", 50, "--seed", seed]
        limits = ["--max-new-tokens", 12, "--kv-cache-dtype", "int8", "--json"]
        command = ["generate", "--model", MODEL, "--prompt", "Who?", *options, *limits]
        return json.loads(run(*command, cwd=tmp_path).stdout)["tokens"]

    assert answer(1) == answer(1) != answer(2)


@pytest.mark.slow
def test_chat(tmp_path):
    lines = f"/image {WIDE}\nWho?\n/image none.png\nWhy?\n/new\nWho?\n/exit\n"
    result = run("chat", "--model", MODEL, "--max-new-tokens", 3, cwd=tmp_path, text=lines)
    assert result.returncode == 0, result.stderr
    assert "none.png cannot be read" in result.stderr
    with_image, _, without = result.stdout.splitlines()[-3:]
    assert with_image != without


def test_inspect(tmp_path):
    result = run("inspect", GOLDEN / "tiny-bf16-sharded", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [line.split("│")[1:-1] for line in result.stdout.splitlines() if "│" in line]
    table = {row[0].strip(): [int(cell.replace(",", "")) for cell in row[1:4]] for row in rows}
    index = json.loads((GOLDEN / "tiny-bf16-sharded/model.safetensors.index.json").read_text())
    assert table["all"][0] == len(index["weight_map"])
    assert table["all"][2] == index["metadata"]["total_size"] == 2 * table["all"][1]
    assert table["visual_embedding"] == [1, 69 * 64, 2 * 69 * 64]
    assert {row[0].strip(): row[-1].strip() for row in rows} == {
        "vision": "visual_tokenizer",
        "visual_tokenizer": "visual_tokenizer",
        "visual_embedding": "visual_embedding",
        "decoder": "llm",
        "(not used)": "",
        "all": "",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nope", "somebody/a-model"])
def test_inspect_downloads_nothing(name, tmp_path):
    message = run_invalid("inspect", name, cwd=tmp_path)
    assert message.startswith(
        f"error: {name} is not a folder; give a converted folder, a folder in"
    )
    assert "a repo id must be converted first, with: ovis-jax convert REPO_ID DIR" in message


@pytest.mark.exhaustive
def test_verify_passes_and_fails(tmp_path):
    cases = [GOLDEN / "cases" / "tiny-f32" / f"{name}.npz" for name in ("tiny", "wide")]
    result = run("verify", MODEL, *cases, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAIL" not in result.stdout and result.stdout.count("pass") == 2 * 13
    result = run("verify", GOLDEN / "tiny-bf16-sharded", cases[0], cwd=tmp_path)
    assert result.returncode == 1 and "FAIL" in result.stdout


@pytest.mark.exhaustive
def test_usage(tmp_path):
    assert run("generate", "--model", MODEL, cwd=tmp_path).returncode == 2
    assert run("nonsense", cwd=tmp_path).returncode == 2
    shown = run("--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in ("generate", "chat", "inspect", "verify"))
    assert "--install-completion" in shown.stdout
    assert run("--version", cwd=tmp_path).stdout == f"ovis-jax {ovis_jax.__version__}\n"


@pytest.mark.exhaustive
def test_invalid_images(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    Image.new("RGB", (300, 2)).save(tmp_path / "flat.png")
    ask = ["generate", "--model", MODEL, "--prompt", "Who?", "--max-partition", 1, "--image"]
    assert "none.png" in run_invalid(*ask, "none.png", cwd=tmp_path)
    assert "broken.png" in run_invalid(*ask, "broken.png", cwd=tmp_path)
    assert "300" in run_invalid(*ask, "flat.png", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        (["--prompt", " "], "empty"),
        (["--prompt", "<image> Who?"], "0 images are given"),
        (["--prompt", "Who?", "--top-p", "0.5"], "temperature"),
        (["--prompt", "word " * 9000], "8192"),
    ],
)
def test_invalid_requests(options, message, tmp_path):
    assert message in run_invalid("generate", "--model", MODEL, *options, cwd=tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "platform, reason",
    [("cuda", "its plugin is not installed"), ("gpuu", "Unable to initialize backend 'gpuu'")],
)
def test_jax_that_cannot_start(platform, reason, tmp_path):
    arguments = ("generate", "--model", MODEL, "--prompt", "Hi")
    error = run_invalid(*arguments, cwd=tmp_path, JAX_PLATFORMS=platform)
    assert f"error: JAX cannot start with JAX_PLATFORMS='{platform}': {reason}" in error
    assert "unset JAX_PLATFORMS" in error


def test_jax_that_cannot_start_without_a_platform_in_the_environment(monkeypatch, capsys):
    def fail():
        raise RuntimeError("the TPU is in use (set JAX_PLATFORMS='' to choose another)")

    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(SystemExit) as caught, exit_on_error():
        raise RuntimeError
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: JAX cannot start: the TPU is in use\n"


@pytest.mark.exhaustive
def test_same_fault_has_the_same_exit_code_in_all_commands(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    without_tokenizer = copy_golden("tiny-f32", tmp_path / "a")
    for path in without_tokenizer.glob("tokenizer*"):
        path.unlink()
    other = copy_golden("tiny-f32", tmp_path / "b")
    config = json.loads((other / "config.json").read_text())
    config["conversation_formatter_class"] = "QwenConversationFormatter"
    (other / "config.json").write_text(json.dumps(config))
    message = "conversation_formatter_class is 'QwenConversationFormatter'"
    for folder, code, expected in (
        (Path("no such folder"), 2, "neither a folder nor a repo id"),
        (empty, 1, "config.json"),
        (without_tokenizer, 1, "tokenizer"),
        (other, 1, message),
    ):
        ask = ["generate", "--model", folder, "--prompt", "Who?"]
        assert expected in run_invalid(*ask, cwd=tmp_path, code=code)
    golden = GOLDEN / "cases" / "tiny-f32" / "wide.npz"
    for command in (["inspect", other], ["convert", other, "out"], ["verify", other, golden]):
        assert message in run_invalid(*command, cwd=tmp_path, code=1)


@pytest.mark.slow
def test_all_problems_of_a_checkpoint_are_in_one_table(tmp_path):
    folder = copy_golden("tiny-bf16-sharded", tmp_path / "a")
    (folder / "model-00002-of-00003.safetensors").unlink()
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model.safetensors")
    for command in (["inspect", folder], ["generate", "--prompt", "Who?", "--model", folder]):
        result = run(*command, cwd=tmp_path)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert result.stderr.startswith("error: ")
        assert "missing file" in result.stderr and "two checkpoints" in result.stderr


LOADING_COMMANDS = {
    "generate": ("generate_and_chat_commands", ["--prompt", "Who?"]),
    "chat": ("generate_and_chat_commands", []),
    "serve": ("server.command", ["--port", "0"]),
    "ui": ("ui.command", []),
    "batch": ("batch.command", ["questions.jsonl", "results.jsonl"]),
    "eval": ("evaluation.command", ["questions.jsonl"]),
    "words": ("words.command", ["--image", WIDE, "--heatmap", "words.png"]),
    "verify": ("checkpoint_commands", [MODEL, GOLDEN / "cases/tiny-f32/wide.npz"]),
}
"""Command -> the module whose `load` it calls, and its required arguments."""


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADING_COMMANDS)
def test_quantization_reaches_load(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    question = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A"}]}
    Path("questions.jsonl").write_text(json.dumps(question))
    module, arguments = LOADING_COMMANDS[name]

    def load(*_, quantization, **__):
        raise OvisError(f"loaded in {quantization}")

    monkeypatch.setattr(importlib.import_module(f"ovis_jax.{module}"), "load", load)
    command = [name, *map(str, arguments), "--quantization", "int4"]
    result = CliRunner().invoke(app, command)
    assert str(result.exception) == "loaded in int4", result.output
    result = CliRunner().invoke(app, [*command[:-1], "int3"])
    assert result.exit_code == 2 and "int3" in result.output


def test_sigterm_is_handled_like_ctrl_c_only_inside_the_block():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interrupt_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
