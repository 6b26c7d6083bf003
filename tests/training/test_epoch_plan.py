"""Plans of epochs: which rows form which micro-batch, how much is padding, and when rows appear."""

from collections import Counter

import numpy as np
import pytest

from ovis_jax.inputs.image_processing import choose_grid
from ovis_jax.training.batches import MAX_BYTES_AHEAD
from ovis_jax.training.epoch_plan import MAX_SHAPES, EpochPlanner, RowSizes, make_planner

CROP_SIZE, TOKENS_PER_CROP = 384, 196
"""The crops of Ovis1.6-Gemma2-9B."""
PHOTOS = ((640, 480), (640, 427), (480, 640), (500, 375), (640, 640), (427, 640))


def llava_like_rows(count: int, seed: int = 0) -> RowSizes:
    """Simulated sizes: 6 % texts, 64 % photos of COCO's sizes, 30 % pictures of any size."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(3, count, p=[0.06, 0.64, 0.30])
    photos = rng.integers(len(PHOTOS), size=count)
    edges = rng.integers(300, 2000, (count, 2)).tolist()
    pictures = zip(kinds, photos, edges, strict=True)
    sizes = [PHOTOS[photo] if kind == 1 else edge for kind, photo, edge in pictures]
    cells = np.array([np.prod(choose_grid(*size, CROP_SIZE, 9)) for size in sizes])
    crops = np.where(kinds == 0, 0, np.where(cells > 1, cells + 1, 1))
    texts = np.exp(rng.normal(5.2, 0.8, count)).astype(np.int64).clip(20, 1800)
    return RowSizes(texts + TOKENS_PER_CROP * crops, crops)


def planner_for(sizes: RowSizes, batch=8, accumulation=4, **options) -> EpochPlanner:
    defaults = {"pad_to_multiple_of": 64, "tokens_per_crop": TOKENS_PER_CROP, "seed": 0}
    return make_planner(
        sizes,
        micro_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **{**defaults, **options},
    )


def rows_of(steps) -> list[int]:
    return [row for step in steps for micro_batch in step for row in micro_batch.rows]


def test_a_llava_like_epoch_trains_every_row_with_little_padding():
    sizes = llava_like_rows(1000)
    planner = planner_for(sizes)
    shapes = set()
    for epoch in range(3):
        steps = planner.plan(epoch)
        assert sorted(rows_of(steps)) == list(range(1000))
        shapes |= {micro_batch.shape for step in steps for micro_batch in step}
        assert max(planner.padding(steps)) < 0.15
        for micro_batch in (each for step in steps for each in step):
            rows = list(micro_batch.rows)
            assert 1 <= len(rows) <= 8
            assert sizes.lengths[rows].max() <= micro_batch.shape.length
            assert sizes.crops[rows].max() <= micro_batch.shape.crops
            assert micro_batch.shape.length % 64 == 0
    assert len(shapes) <= MAX_SHAPES == 12 and shapes == set(planner.shapes)
    # Micro-batches ahead, one being trained, one on its way to the devices.
    largest = 8 * max(shape.crops for shape in shapes) * CROP_SIZE**2 * 3 * 4
    assert MAX_BYTES_AHEAD + 2 * largest < 2**30


@pytest.mark.parametrize("count", [1, 7, 9, 33, 100, 1001])
@pytest.mark.parametrize("batch, accumulation", [(1, 1), (8, 1), (8, 4)])
def test_every_row_is_trained_once_and_no_small_rest_remains(count, batch, accumulation):
    steps = planner_for(llava_like_rows(count), batch, accumulation).plan(0)
    assert sorted(rows_of(steps)) == list(range(count))
    per_step = {len(step) for step in steps}
    assert max(per_step) <= accumulation and max(per_step) - min(per_step) <= 1
    by_shape: dict = {}
    for micro_batch in (each for step in steps for each in step):
        by_shape.setdefault(micro_batch.shape, []).append(len(micro_batch.rows))
    for counts in by_shape.values():
        assert max(counts) <= batch and max(counts) - min(counts) <= 1


def test_a_plan_depends_only_on_sizes_seed_and_epoch():
    sizes = llava_like_rows(200)
    plans = [
        planner_for(sizes, seed=seed).plan(epoch)
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0), (-1, 0))
    ]
    assert plans[0] == plans[1]
    assert len({str(plan) for plan in plans}) == 4
    # A pinned value: all versions of NumPy give the same plan.
    small = planner_for(RowSizes(np.arange(1, 7) * 50, np.zeros(6, np.int64)), 2, 2)
    assert str([[each.rows for each in step] for step in small.plan(0)]) == PINNED


PINNED = "[[(1, 0), (4, 3)], [(5, 2)]]"


def test_equal_rows_have_one_shape():
    planner = planner_for(RowSizes(np.full(20, 300), np.full(20, 1)))
    assert planner.shapes == ((320, 1),)


def test_few_rows_share_a_shape_rather_than_fill_their_own_with_padding():
    sizes = RowSizes(np.array([100, 200, 300, 400, 500, 600]), np.zeros(6, np.int64))
    assert planner_for(sizes, batch=8).shapes == ((640, 0),)
    assert len(planner_for(sizes, batch=1).shapes) == 6


def test_many_different_sizes_are_grouped_before_merging():
    rng = np.random.default_rng(0)
    sizes = RowSizes(rng.integers(1, 8192, 5000), rng.integers(0, 40, 5000))
    planner = planner_for(sizes, pad_to_multiple_of=1)
    assert len(planner.shapes) <= MAX_SHAPES
    assert sorted(rows_of(planner.plan(0))) == list(range(5000))


def test_weights_say_how_often_the_rows_of_a_dataset_appear():
    sources = np.array([0] * 10 + [1] * 10 + [2] * 4)
    sizes = RowSizes(np.full(24, 100), np.zeros(24, np.int64))
    planner = planner_for(sizes, batch=2, sources=sources, weights=(1.0, 2.5, 0.25))
    seen = Counter()
    for epoch in range(4):
        times = Counter(rows_of(planner.plan(epoch)))
        assert all(times[row] == 1 for row in range(10))
        assert sorted(times[row] for row in range(10, 20)) == [2] * 5 + [3] * 5
        assert sum(times[row] for row in range(20, 24)) == 1
        seen += times
    # Every row has appeared as often as the weights say on average.
    assert all(seen[row] == 10 for row in range(10, 20))
    assert all(seen[row] == 1 for row in range(20, 24))


def test_a_small_weight_still_gives_one_row():
    sizes = RowSizes(np.full(13, 100), np.zeros(13, np.int64))
    sources = np.array([0] * 10 + [1] * 3)
    planner = planner_for(sizes, batch=1, sources=sources, weights=(1.0, 0.01))
    rows = [[row for row in rows_of(planner.plan(epoch)) if row >= 10] for epoch in range(3)]
    assert sorted(rows) == [[10], [11], [12]]
