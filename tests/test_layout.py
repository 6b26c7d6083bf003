"""The import directions of the tree, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("ovis_jax/**/*.py"), *ROOT.glob("convert/**/*.py")])

# Lowest first. A module may import from its own level and from those below it.
LEVELS = [
    {"ovis_jax.errors"},
    {"ovis_jax.fields", "ovis_jax.processes"},
    {"ovis_jax.config"},
    {"ovis_jax.presets", "ovis_jax.sharding", "ovis_jax.inputs"},
    {"ovis_jax.checkpoint", "ovis_jax.model"},
    {"ovis_jax.inference", "ovis_jax.console", "ovis_jax.compile_cache"},
    {"ovis_jax.loading", "ovis_jax.verify", "ovis_jax.training", "ovis_jax.plan"},
    {"ovis_jax.serving"},
    {"ovis_jax.cli", "ovis_jax"},
    {"convert"},
]
HOST_ONLY = {"ovis_jax.inputs", "ovis_jax.config", "ovis_jax.fields", "ovis_jax.errors"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The package or file directly below ovis_jax, or convert."""
    return ".".join(module.split(".")[: 1 if module.startswith("convert") else 2])


def level_of(module: str) -> int:
    part = "ovis_jax.cli" if module == "ovis_jax.__main__" else part_of(module)
    return next(n for n, parts in enumerate(LEVELS) if part in parts)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "ovis_jax" else {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path):
    module = module_of(path)
    for imported in imports(path):
        root = imported.split(".")[0]
        assert root not in ("torch", "transformers"), f"{module} imports {imported}"
        assert not imported.startswith("jax._src"), f"{module} imports {imported}"
        if root in ("ovis_jax", "convert"):
            assert level_of(imported) <= level_of(module), f"{module} imports {imported}"
        if part_of(module) in HOST_ONLY:
            assert root not in ("jax", "flax"), f"{module} runs on the host and imports {imported}"


def test_every_file_has_a_level():
    assert len(FILES) > 25
    assert {level_of(module_of(path)) for path in FILES} == set(range(len(LEVELS)))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_stay_readable(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 300
    assert not any(word in path.stem for word in ("utils", "helpers", "misc", "lib"))
