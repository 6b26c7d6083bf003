"""The notebook runs, and its output is plausible."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


@pytest.mark.exhaustive
def test_visual_words(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "visual_words.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    resources = {"metadata": {"path": str(ROOT / "examples")}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    text = "".join(output.get("text", "") for output in outputs)
    assert float(re.search(r"sum from 1: ([\d.e-]+)", text)[1]) < 1e-5
    assert 0 < float(re.search(r"shared: ([\d.]+)%", text)[1]) <= 100
    yellow, purple = re.search(r"two answers: \[\[ *(-[\d.]+) +(-[\d.]+)\]\]", text).groups()
    assert float(purple) < float(yellow) - 3
