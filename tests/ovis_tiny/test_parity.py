"""ovis-tiny on the PyTorch side says the same, wherever the two best tokens are apart."""

import numpy as np
import pytest
from reference.ovis_torch import VISUAL_SLOT, OvisTorch

import ovis_jax
from ovis_jax.checkpoint.source import BUILT_IN
from ovis_jax.training.evaluation import answer_rows
from ovis_jax.training.rows import read_rows

MARGIN = 1e-2


@pytest.fixture(scope="module")
def reference():
    return OvisTorch.from_folder(BUILT_IN["ovis-tiny"])


def test_both_sides_give_the_same_answers(reference, draw_test):
    ovis = ovis_jax.load("ovis-tiny", dtype="float32")
    rows = read_rows([draw_test(rounds=2)]).rows
    assert len(rows) == 52
    compared = 0
    for answer in answer_rows(ovis.processor, ovis.model, ovis.params, rows, batch=52):
        turns, images = list(answer.row.turns[:-1]), answer.row.open_images()
        tokens, positions, pixels = ovis.processor([turns], [images])
        ids = one_slot_a_crop(tokens[0][positions[0] >= 0])
        crops = pixels.transpose(0, 3, 1, 2) if len(pixels) else None
        expected = reference.generate(ids, crops, len(answer.tokens))
        close = np.flatnonzero(expected.margins <= MARGIN)
        end = close[0] if len(close) else len(answer.tokens)
        assert answer.tokens[:end].tolist() == expected.tokens[:end].tolist(), answer
        compared += end
    assert compared > 6 * len(rows)


def one_slot_a_crop(tokens: np.ndarray, tokens_per_crop: int = 9) -> np.ndarray:
    """The original's ids: of the slots of each crop the first."""
    slots = tokens == VISUAL_SLOT
    return tokens[~slots | ((np.cumsum(slots) - 1) % tokens_per_crop == 0)]
