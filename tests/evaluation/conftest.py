"""Questions about drawn scenes, one of each kind and language."""

from dataclasses import replace
from functools import partial

import pytest

import ovis_jax
from ovis_jax import Bucket
from recipes.ovis_tiny import generate_dataset

SEED = 2
BUCKET = Bucket(rows=13, length=128, crops=39)
QUESTIONS = len(generate_dataset.KINDS) * len(generate_dataset.LANGUAGES)


@pytest.fixture(scope="session")
def scene_questions(tmp_path_factory):
    """A file of 26 questions."""
    folder = tmp_path_factory.mktemp("drawn")
    make = partial(generate_dataset.evaluation_lines, split="test", seed=SEED)
    generate_dataset.write_dataset(folder, make, QUESTIONS, num_workers=1)
    return folder / "test.jsonl"


@pytest.fixture(scope="module")
def ovis():
    """ovis-tiny with a single batch shape, so that everything under test compiles one program."""
    ovis = ovis_jax.load("ovis-tiny")
    processor = replace(ovis.processor, buckets=(BUCKET,))
    ovis = replace(ovis, processor=processor)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("ovis_jax.loading", "ovis_jax.evaluation.command"):
            patch.setattr(f"{module}.load", lambda *_, **__: ovis)
        yield ovis
