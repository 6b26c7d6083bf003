"""Questions about drawn scenes, one of each kind and language."""

from dataclasses import replace
from functools import partial

import pytest

import ovis_jax
from ovis_jax import Bucket
from recipes.ovis_tiny import draw_data

SEED = 2
BUCKET = Bucket(rows=13, length=128, crops=39)
QUESTIONS = len(draw_data.KINDS) * len(draw_data.LANGUAGES)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A file of 26 questions."""
    folder = tmp_path_factory.mktemp("drawn")
    make = partial(draw_data.scored_lines, split="test", seed=SEED)
    draw_data.write(folder, make, QUESTIONS, workers=1)
    return folder / "test.jsonl"


@pytest.fixture(scope="module")
def ovis():
    """ovis-tiny as everything under test loads it: one shape of batches, so one program."""
    ovis = ovis_jax.load("ovis-tiny")
    processor = replace(ovis.processor, buckets=(BUCKET,))
    ovis = replace(ovis, processor=processor)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("ovis_jax.loading", "ovis_jax.evaluation.command"):
            patch.setattr(f"{module}.load", lambda *_, **__: ovis)
        yield ovis
