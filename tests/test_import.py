"""Importing the package where modules of Unix are missing, as on Windows."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNIX_MODULES = ("fcntl", "grp", "pwd", "resource", "termios")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["ovis_jax", "ovis_jax.cli"])
def test_import_without_unix_modules(module):
    script = f"""
import importlib, sys
for name in {UNIX_MODULES}:
    sys.modules[name] = None
importlib.import_module({module!r})
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
