import pytest
from shallow import shallow_config

from benchmarks import models


@pytest.fixture
def small(monkeypatch):
    """Let `--preset tiny` be smaller still: what is compiled is all that these tests cost."""
    config = shallow_config()
    monkeypatch.setitem(models.PRESETS, "tiny", lambda: config)
    return config
