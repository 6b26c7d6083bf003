"""Questions about new test scenes, which neither the training nor the model card used."""

from functools import partial
from pathlib import Path

import pytest

from recipes.ovis_tiny import generate_dataset

SEED = 1


@pytest.fixture(scope="session")
def draw_test(tmp_path_factory):
    """Write `rounds` questions per kind and language, or about one colour, to a file."""

    def draw(rounds: int, colour: str = "") -> Path:
        folder = tmp_path_factory.mktemp("ovis-tiny")
        kinds = len(generate_dataset.COLOUR_KINDS) + 1 if colour else len(generate_dataset.KINDS)
        make = partial(generate_dataset.evaluation_lines, split="test", seed=SEED, colour=colour)
        number = rounds * kinds * len(generate_dataset.LANGUAGES)
        generate_dataset.write_dataset(folder, make, number, num_workers=1)
        return folder / "test.jsonl"

    return draw
