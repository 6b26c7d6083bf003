"""The command line's compilation cache, in processes of their own, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from ovis_jax.compile_cache import (
    DIR_VARIABLE,
    MAX_SIZE,
    MAX_SIZE_VARIABLE,
    MIN_SECONDS_VARIABLE,
    enable_compilation_cache,
)

ROOT = Path(__file__).parents[1]
VARIABLES = (DIR_VARIABLE, MIN_SECONDS_VARIABLE, MAX_SIZE_VARIABLE)


def run(cwd: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | variables
    result = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result


def answer(cwd: Path, cache: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    options = ("--prompt", "Hello!", "--max-new-tokens", "4", "--model", "ovis-tiny")
    command = ("-m", "ovis_jax", "generate", *options)
    return run(cwd, *command, XDG_CACHE_HOME=str(cache), **variables)


def programs(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name.endswith("-cache")}


@pytest.mark.exhaustive
def test_a_second_run_loads_what_the_first_compiled(tmp_path):
    first = answer(tmp_path, tmp_path / "cache")
    stored = programs(tmp_path / "cache" / "ovis_jax" / "compilation_cache")
    for program in ("prefill_and_decode", "decode_more"):
        assert any(program in name for name in stored)
    assert first.stderr == ""
    log = {"JAX_LOG_COMPILES": "1", "JAX_LOGGING_LEVEL": "DEBUG"}
    second = answer(tmp_path, tmp_path / "cache", **log)
    assert second.stdout == first.stdout and len(first.stdout) > 1
    assert programs(tmp_path / "cache" / "ovis_jax" / "compilation_cache") == stored
    assert "Persistent compilation cache hit for 'jit_prefill_and_decode'" in second.stderr
    assert "cache miss" not in second.stderr.lower()


@pytest.mark.exhaustive
def test_jaxs_variables_take_precedence(tmp_path):
    """The folder is the user's; the size limit is too small for a second program."""
    own = {DIR_VARIABLE: str(tmp_path / "own"), MAX_SIZE_VARIABLE: "1000000"}
    answer(tmp_path, tmp_path / "cache", **own)
    stored = programs(tmp_path / "own")
    assert stored and sum(map(len, stored.values())) <= 1_000_000
    assert not (tmp_path / "cache").exists()


@pytest.mark.exhaustive
def test_the_default_size_limit(tmp_path):
    script = (
        "import json, jax, ovis_jax.compile_cache as c; c.enable_compilation_cache(); "
        "print(json.dumps([jax.config.jax_compilation_cache_max_size,"
        " jax.config.jax_compilation_cache_dir]))"
    )
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    expected = [MAX_SIZE, str(tmp_path / "ovis_jax" / "compilation_cache")]
    assert json.loads(run(tmp_path, "-c", script, **cache).stdout) == expected
    limited = run(tmp_path, "-c", script, **cache, **{MAX_SIZE_VARIABLE: "12345"})
    assert json.loads(limited.stdout)[0] == 12345


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    command = ("-m", "ovis_jax", "inspect", "ovis-tiny")
    result = run(tmp_path, *command, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert result.stderr.startswith("note: compiled programs are not stored for the next run: ")
    assert result.stderr.count("\n") == 1 and DIR_VARIABLE in result.stderr


@pytest.mark.parametrize(
    ("folder", "expected"), [("compiled", "{cwd}/compiled"), ("/var/c", "/var/c"), ("gs://b", None)]
)
def test_a_folder_from_the_environment_does_not_depend_on_the_working_folder(
    folder, expected, tmp_path, monkeypatch
):
    updates = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(DIR_VARIABLE, folder)
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    enable_compilation_cache()
    found = updates.get("jax_compilation_cache_dir")
    assert found == (expected and expected.format(cwd=tmp_path))
