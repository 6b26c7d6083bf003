"""Import directions, read from the source: a module imports from its own level and those below."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("ovis_jax/**/*.py"), *ROOT.glob("convert/**/*.py")])

LEVELS = [
    {"errors", "argument_type_checks", "user_files"},
    {"json_fields", "distributed", "process_agreement", "global_arrays"},
    {"config"},
    {"presets", "sharding", "mesh", "inputs"},
    {"quantization"},
    {"checkpoint", "model"},
    {"inference", "console", "compile_cache", "process_options"},
    {"loading", "verify_goldens", "conversion", "plan"},
    {"engine", "evaluation", "words"},
    {"training"},
    {"server", "ui"},
    {"batch"},
    {"cli", "generate_and_chat_commands", "checkpoint_commands", "plan_command"}
    | {"__init__", "__main__"},
    {"convert"},
]
"""Folders and files of `ovis_jax`, and `convert`, from the lowest level to the highest."""

HOST_ONLY = {"inputs", "config", "json_fields", "user_files", "errors", "argument_type_checks"}
"""Parts that run on the host and must not import JAX."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def part_of(module: str) -> str:
    """The folder or file directly below `ovis_jax` that a module belongs to, or `convert`."""
    package, _, rest = module.partition(".")
    return "convert" if package == "convert" else rest.partition(".")[0] or "__init__"


def level_of(module: str) -> int:
    return next(n for n, parts in enumerate(LEVELS) if part_of(module) in parts)


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "ovis_jax" else {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path):
    module = module_name(path)
    for imported in imported_modules(path):
        root = imported.split(".")[0]
        assert root not in ("torch", "transformers"), f"{module} imports {imported}"
        assert not imported.startswith("jax._src"), f"{module} imports {imported}"
        if root in ("ovis_jax", "convert"):
            assert level_of(imported) <= level_of(module), f"{module} imports {imported}"
        if part_of(module) in HOST_ONLY and root != "ovis_jax":
            assert root not in ("jax", "flax"), f"{module} imports {imported}"


@pytest.mark.parametrize("path", [f for f in FILES if "ui" in f.parts], ids=module_name)
def test_the_page_uses_the_engine_and_not_the_server(path):
    imports = {name for name in imported_modules(path) if part_of(name) == "server"}
    assert imports <= {"ovis_jax.server.host_check", "ovis_jax.server.sockets"}


def test_every_level_has_files():
    assert {level_of(module_name(path)) for path in FILES} == set(range(len(LEVELS)))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_file_names_say_what_is_inside(path):
    assert not any(word in path.stem for word in ("utils", "helpers", "misc", "lib"))
