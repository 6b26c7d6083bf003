"""Questions about scenes of the test that neither training nor the model card has seen drawn."""

from functools import partial
from pathlib import Path

import pytest

from recipes.ovis_tiny import draw_data

SEED = 1


@pytest.fixture(scope="session")
def draw_test(tmp_path_factory):
    """Draw `rounds` questions of each kind and language, or of a colour; gives the file."""

    def draw(rounds: int, colour: str = "") -> Path:
        folder = tmp_path_factory.mktemp("ovis-tiny")
        kinds = len(draw_data.COLOUR_KINDS) + 1 if colour else len(draw_data.KINDS)
        make = partial(draw_data.scored_lines, split="test", seed=SEED, colour=colour)
        number = rounds * kinds * len(draw_data.LANGUAGES)
        draw_data.write(folder, make, number, workers=1)
        return folder / "test.jsonl"

    return draw
