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
HELPERS = [
    "server.request_schema",
    "server.images",
    "server.errors",
    "server.middleware",
    "server.metrics",
]


@pytest.mark.parametrize("module", [*CALLS, *HELPERS])
def test_imports_among_the_six_files(module):
    path = ROOT / f"{module.replace('.', '/')}.py"
    nodes = ast.walk(ast.parse(path.read_text()))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    own = {name.removeprefix("ovis_jax.") for name in imported if name}
    assert own & CALLS.keys() == CALLS.get(module, set())
