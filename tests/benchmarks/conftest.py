import pytest
from shallow import shallow_config

from benchmarks.support import benchmark_model


@pytest.fixture
def small(monkeypatch):
    """Make `--preset tiny` even smaller, because compilation dominates these tests."""
    config = shallow_config()
    monkeypatch.setitem(benchmark_model.PRESETS, "tiny", lambda: config)
    return config
