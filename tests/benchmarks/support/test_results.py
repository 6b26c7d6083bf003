"""Output of results, and the description of the machine that belongs to them."""

import json

import jax
import pytest

from benchmarks.support.results import plot_results, write_results


def test_json_is_written(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_results(path, {"threads": 1}, rows=[1])
    written = json.loads(path.read_text())
    machine = written.pop("machine")
    assert machine["versions"]["jax"] == jax.__version__ and machine["threads"] == 1
    assert written == {"rows": [1]}
    write_results(None, rows=[1])


@pytest.mark.parametrize("lines", [False, True])
def test_plots_are_written(tmp_path, lines):
    path = tmp_path / "plot.png"
    plot_results(path, "title", [1, 2], {"x": [1.0, 2.0]}, "ms", lines=lines, reference=1.0)
    assert path.read_bytes().startswith(b"\x89PNG")
