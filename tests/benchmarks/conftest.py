from dataclasses import replace

import pytest

from benchmarks import models
from ovis_jax import presets


@pytest.fixture
def small(monkeypatch):
    """Let `--preset tiny` be smaller still: what is compiled is all that these tests cost."""
    c = presets.tiny()
    vision = replace(c.visual_tokenizer.vision, depth=1)
    tokenizer = replace(c.visual_tokenizer, vision=vision)
    config = replace(c, visual_tokenizer=tokenizer, decoder=replace(c.decoder, depth=2))
    monkeypatch.setitem(models.PRESETS, "tiny", lambda: config)
    return config
