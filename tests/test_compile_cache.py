"""The command line keeps what it compiles; in processes of their own, as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWN = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


def run(cwd: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "ovis_jax", *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in OWN}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | variables
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result


def answer(cwd: Path, cache: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    options = ("--prompt", "Hello!", "--max-new-tokens", "4", "--model", "ovis-tiny")
    return run(cwd, "generate", *options, XDG_CACHE_HOME=str(cache), **variables)


def programs(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name.endswith("-cache")}


def test_a_second_run_reads_what_the_first_compiled(tmp_path):
    first = answer(tmp_path, tmp_path / "cache")
    kept = programs(tmp_path / "cache" / "ovis_jax" / "compiled")
    assert any("begin" in name for name in kept) and any("continue" in name for name in kept)
    assert first.stderr == ""
    log = {"JAX_LOG_COMPILES": "1", "JAX_LOGGING_LEVEL": "DEBUG"}
    second = answer(tmp_path, tmp_path / "cache", **log)
    assert second.stdout == first.stdout and len(first.stdout) > 1
    assert programs(tmp_path / "cache" / "ovis_jax" / "compiled") == kept
    assert "Persistent compilation cache hit for 'jit__begin'" in second.stderr
    assert "cache miss" not in second.stderr.lower()


def test_the_users_folder_stands(tmp_path):
    own = {OWN[0]: str(tmp_path / "own")}
    answer(tmp_path, tmp_path / "cache", **own)
    assert programs(tmp_path / "own") and not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_is_one_note(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    result = run(tmp_path, "inspect", "ovis-tiny", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert result.stderr.startswith("note: what is compiled is not kept for the next run: ")
    assert result.stderr.count("\n") == 1 and OWN[0] in result.stderr
