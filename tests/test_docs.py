"""Every code block in docs/ runs as it is printed."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.main import get_command

from ovis_jax.cli import app
from ovis_jax.training.config import (
    DataConfig,
    LoraConfig,
    MeshConfig,
    RunConfig,
    StepConfig,
    TrainConfig,
    read_train_config,
)

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"


def blocks(page: Path, language: str) -> list[str]:
    """Return the blocks whose fence states this language and nothing else."""
    found = re.findall(r"^```(.*?)\n(.*?)^```$", page.read_text(), re.S | re.M)
    return [text for said, text in found if said == language]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
WITH_COMMANDS = [page for page in PAGES if blocks(page, "sh")]


def name(page: Path) -> str:
    return page.name


def test_pages_are_found():
    assert len(WITH_PYTHON) >= 4 and len(WITH_COMMANDS) >= 3


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python_runs(page, monkeypatch):
    """The blocks of a page form one program."""
    monkeypatch.chdir(ROOT)
    exec(compile("\n".join(blocks(page, "python")), page.name, "exec"), {})


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name)
def test_commands_run(page, tmp_path):
    """The blocks of a page form one session, which ends at the first command that fails."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for file, text in re.findall(
        r'^```\w+ title="([^"]+)"\n(.*?)^```', page.read_text(), re.S | re.M
    ):
        (tmp_path / file).write_text(text)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"  # as users have
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks(page, "sh"))],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        with contextlib.suppress(ProcessLookupError):  # background processes of the page
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    if page.name == "evaluation.md":  # ovis-tiny gives the answers of the example
        assert re.search(r"│ all .* 100\.0% │", output), output


def test_commands_that_cannot_run_here_exist():
    """Blocks without a language need the Hub or a user: check targets, extras and options."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    commands = vars(get_command(app))["commands"]
    seen = set()
    for page in [*PAGES, README]:
        for line in "".join(blocks(page, "")).splitlines():
            if not re.match("make|pip|ovis-jax|python", line):
                continue
            words = shlex.split(line, comments=True)
            match words:
                case ["make", target]:
                    assert target in targets, line
                case ["pip", "install", package]:
                    assert package in {f".[{extra}]" for extra in extras}, line
                case ["ovis-jax", command, *rest]:
                    known = {option for x in commands[command].params for option in x.opts}
                    assert {word for word in rest if word.startswith("-")} <= known, line
                case ["python", "-m", module, *_]:
                    assert find_spec(module), line
                case _:
                    raise AssertionError(line)
            seen.add(words[0])
    assert seen >= {"make", "pip", "ovis-jax"}


def test_the_training_config_is_valid(tmp_path):
    (text,) = blocks(ROOT / "docs" / "training.md", "toml")
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    config = read_train_config(path)
    assert config.mesh is not None and config.mesh.data * config.mesh.model == 8
    lora = re.search(r"^# (lora = .*)$", text, re.M)
    assert lora
    path.write_text(re.sub(r"^trainable = .*$", lora[1], text, flags=re.M))
    assert read_train_config(path).lora is not None


def test_names_on_the_migration_page_exist():
    """The second column of its tables names options of commands and fields of the config."""
    commands = vars(get_command(app))["commands"].values()
    options = {option for command in commands for x in command.params for option in x.opts}
    tables = {"lora": LoraConfig, "data": DataConfig, "training": StepConfig, "run": RunConfig}
    tables |= {"mesh": MeshConfig}
    rows = re.findall(r"^\|.*\|(.*)\|.*\|$", (ROOT / "docs" / "migration.md").read_text(), re.M)
    found = re.findall(r"(?<![\w-])(--[a-z-]+\w)", "".join(rows))
    assert len(found) > 20 and set(found) <= options
    fields = re.findall(r"`(lora|data|training|run|mesh)\.(\w+)`", "".join(rows))
    assert len(fields) > 10
    for table, field in fields:
        assert table in TrainConfig.model_fields and field in tables[table].model_fields, field


@pytest.mark.parametrize("page", [*PAGES, README], ids=name)
def test_links_point_to_files_and_headings(page):
    """A link names a file and optionally a heading in it."""
    for path, heading in re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#([^)]*))?\)", page.read_text()):
        target = page.parent / path
        assert target.exists(), path
        if heading:
            lines = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines]
            assert heading in anchors, path
