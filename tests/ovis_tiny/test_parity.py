"""ovis-tiny gives the same answers in PyTorch, where the two best tokens differ clearly."""

import numpy as np
import pytest
from reference.ovis_torch import VISUAL_SLOT, OvisTorch

import ovis_jax
from ovis_jax.checkpoint.resolve import BUNDLED
from ovis_jax.evaluation.batch_answering import answer_rows
from ovis_jax.inputs.dataset import read_dataset

pytestmark = [pytest.mark.torch, pytest.mark.optimized]

MARGIN = 1e-2


@pytest.fixture(scope="module")
def reference():
    return OvisTorch.from_folder(BUNDLED["ovis-tiny"])


@pytest.mark.exhaustive
def test_answers_are_the_same(reference, draw_test):
    ovis = ovis_jax.load("ovis-tiny", dtype="float32")
    rows = read_dataset([draw_test(rounds=2)]).rows
    assert len(rows) == 52
    compared = 0
    for answer in answer_rows(ovis, rows, batch_size=52):
        turns, images = list(answer.row.turns[:-1]), answer.row.open_images()
        example = ovis.processor.encode(turns, images)
        ids = one_slot_per_crop(example.tokens)
        crops = example.pixels.transpose(0, 3, 1, 2) if len(example.pixels) else None
        expected = reference.generate(ids, crops, len(answer.token_ids))
        close = np.flatnonzero(expected.margins <= MARGIN)
        end = close[0] if len(close) else len(answer.token_ids)
        assert answer.token_ids[:end].tolist() == expected.tokens[:end].tolist(), answer
        compared += end
    assert compared > 6 * len(rows)


def one_slot_per_crop(tokens: np.ndarray, tokens_per_crop: int = 9) -> np.ndarray:
    """Convert to the original's ids, which keep only the first slot of each crop."""
    slots = tokens == VISUAL_SLOT
    return tokens[~slots | ((np.cumsum(slots) - 1) % tokens_per_crop == 0)]
