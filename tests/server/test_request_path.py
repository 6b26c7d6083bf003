"""Six files lie between HTTP and the model; the other files of the server call none of them."""

import ast
from pathlib import Path

import pytest

import ovis_jax

ROOT = Path(ovis_jax.__file__).parent
CALLS = {
    "server.app": {"server.preprocess", "engine.scheduler", "server.responses"},
    "server.preprocess": set(),
    "engine.scheduler": {"engine.runner", "engine.state"},
    "engine.runner": {"engine.state"},
    "engine.state": set(),
    "server.responses": set(),
}
"""Which of the six files each of them imports."""
HELPERS = {
    "server.host_check",
    "server.load_balancing",
    "server.middleware",
    "server.request_schema",
    "server.images",
    "server.image_threads",
    "server.errors",
    "server.metrics",
}
STARTUP = {
    "server.command",
    "server.connections",
    "server.ray_app",
    "server.shutdown",
    "server.sockets",
}


def own_imports(module: str) -> set[str]:
    nodes = ast.walk(ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text()))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.removeprefix("ovis_jax.") for name in imported if name}


@pytest.mark.parametrize("module", [*CALLS, *sorted(HELPERS)])
def test_imports_among_the_six_files(module):
    assert own_imports(module) & CALLS.keys() == CALLS.get(module, set())


def test_every_file_of_the_server_is_on_the_path_or_called_from_it():
    assert HELPERS <= set().union(*map(own_imports, CALLS))
    files = {f"server.{path.stem}" for path in (ROOT / "server").glob("[!_]*.py")}
    assert files - CALLS.keys() == HELPERS | STARTUP
