import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from recipes.ovis_tiny.scenes import (
    CELL,
    COLOURS,
    DIGITS,
    HELD_OUT_COLOUR,
    SHAPES,
    SIZES,
    SPLITS,
    SQUARE,
    WIDE,
    WORDS,
    Scene,
    Thing,
    draw_scene,
    random_scene,
    split_of_scene,
)


def scenes(number, split="train", seed=0, **options):
    rng = random.Random(seed)
    return [random_scene(rng, split, **options) for _ in range(number)]


def test_a_seed_gives_the_same_scenes_and_pictures():
    assert scenes(20) == scenes(20) != scenes(20, seed=1)
    for scene in scenes(5, texts=WORDS):
        assert draw_scene(scene).tobytes() == draw_scene(scene).tobytes()


def test_the_seed_of_a_scene_does_not_change_its_split():
    for split in SPLITS:
        for scene in scenes(20, split):
            assert (
                split_of_scene(scene)
                == split_of_scene(replace(scene, seed=scene.seed + 1))
                == split
            )


@pytest.mark.parametrize("columns, counts", [(SQUARE, range(1, 6)), (WIDE, range(2, 7))])
@pytest.mark.parametrize("texts", [(), DIGITS, WORDS])
def test_everything_has_its_own_cell(columns, counts, texts):
    for scene in scenes(100, columns=columns, texts=texts):
        cells = [(thing.row, thing.column) for thing in scene.things]
        assert cells == sorted(cells)
        if scene.text:
            covered = SQUARE if scene.word else 1
            assert scene.text_column % covered == 0
            cells += [(scene.text_row, scene.text_column + i) for i in range(covered)]
        assert len(set(cells)) == len(cells)
        assert all(0 <= row < 3 and 0 <= column < columns for row, column in cells)
        assert len(scene.things) in counts
        assert draw_scene(scene).size == (columns * CELL, 3 * CELL)


def test_all_shapes_colours_and_sizes_occur():
    things = [thing for scene in scenes(400) for thing in scene.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {thing.size for thing in things} == set(SIZES)
    assert HELD_OUT_COLOUR not in COLOURS
    on_request = scenes(50, colour=HELD_OUT_COLOUR)
    assert all(any(t.colour == HELD_OUT_COLOUR for t in scene.things) for scene in on_request)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_stay_in_their_cell_and_are_visible(shape, size):
    for seed in range(6):
        picture = np.array(
            draw_scene(Scene(SQUARE, (Thing(shape, "black", size, 1, 1),), seed=seed))
        )
        inked = picture.sum(axis=2) < 500
        across, down = np.any(inked, axis=0).nonzero()[0], np.any(inked, axis=1).nonzero()[0]
        assert CELL <= min(across) and max(across) < 2 * CELL
        assert CELL <= min(down) and max(down) < 2 * CELL
        assert 8 <= len(down) <= 14 if size == "small" else 18 <= len(down) <= 25


def test_shapes_differ_from_each_other():
    pictures = {
        shape: np.array(draw_scene(Scene(SQUARE, (Thing(shape, "red", "small", 1, 1),)))).astype(
            int
        )
        for shape in SHAPES
    }
    for one, first in pictures.items():
        for other, second in pictures.items():
            if one != other:
                assert (abs(first - second).sum(axis=2) > 150).sum() >= 15, f"{one} and {other}"


def test_colours_are_distinguishable():
    colours = {}
    for colour in (*COLOURS, HELD_OUT_COLOUR):
        colours[colour] = [
            np.array(draw_scene(Scene(SQUARE, (Thing("square", colour, "big", 1, 1),), seed=seed)))[
                42, 42
            ]
            for seed in range(10)
        ]
    for one, first in colours.items():
        for other, second in colours.items():
            if one != other:
                distances = [abs(a.astype(int) - b).sum() for a in first for b in second]
                assert min(distances) > 60, f"{one} and {other}"


@pytest.mark.parametrize("text", [*DIGITS, *WORDS])
def test_letters_are_large_and_stay_in_their_cells(text):
    columns = SQUARE if len(text) > 1 else 1
    for seed in range(3):
        scene = Scene(WIDE, (), text, text_row=1, text_column=3, seed=seed)
        inked = np.array(draw_scene(scene)).sum(axis=2) < 400
        across, down = np.any(inked, axis=0).nonzero()[0], np.any(inked, axis=1).nonzero()[0]
        assert 3 * CELL <= min(across) and max(across) < (3 + columns) * CELL
        assert CELL <= min(down) and max(down) < 2 * CELL
        assert len(down) >= (14 if columns > 1 else 21)
        assert columns == 1 or max(across) - min(across) > 55


def test_colours_repeat_often_enough_to_be_counted():
    counts = Counter(
        max(Counter(thing.colour for thing in scene.things).values()) for scene in scenes(400)
    )
    assert sum(n for most, n in counts.items() if most >= 2) > 150
    assert sum(n for most, n in counts.items() if most >= 3) > 40
