import dataclasses
import functools
import io
import json
import operator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovis_jax.errors import ConfigError, ImageError
from ovis_jax.inputs.image_processing import (
    ImageProcessorConfig,
    choose_grid,
    grid_boxes,
    image_placeholder_ids,
    preprocess_image,
)
from ovis_jax.inputs.open_image import open_image

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT = GOLDEN / "tiny-f32"
CASES = sorted(
    path.stem
    for path in (GOLDEN / "cases" / "tiny-f32").glob("*.npz")
    if path.stem not in ("batch_leftpad", "text_only")
)
SETTINGS = ImageProcessorConfig.from_folder(CHECKPOINT, 70)


@pytest.mark.parametrize("case", CASES)
def test_crops_equal_the_original_bit_for_bit(case):
    golden = np.load(GOLDEN / "cases" / "tiny-f32" / f"{case}.npz")
    meta = json.loads(str(golden["meta"]))
    images = [
        open_image(GOLDEN / "images" / Path(name).name, exact=True) for name in meta["images"]
    ]
    pixels, grids = zip(
        *(preprocess_image(i, SETTINGS, meta["max_partition"]) for i in images), strict=True
    )
    assert [list(grid) for grid in grids] == golden["grids"].tolist()
    found = np.concatenate(pixels)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(
        found.view(np.int32), golden["pixel_values"].transpose(0, 2, 3, 1).view(np.int32)
    )


def test_sizes_are_computed_in_floats():
    # 17 / 28 * 84 is 50.99999999999999 in floats, 51 in integers.
    settings = dataclasses.replace(SETTINGS, crop_size=84)
    pixels, grid = preprocess_image(Image.new("RGB", (28, 17), "white"), settings, 1)
    assert grid == (1, 1)
    assert np.flatnonzero(pixels[0].any(axis=(1, 2))).tolist() == list(range(17, 67))


@pytest.mark.parametrize("height", [1, 3])
def test_images_of_height_1_and_3(height):
    image = Image.new("RGB", (30, height), (255, 127, 0))
    pixels, _ = preprocess_image(image, SETTINGS, 1)
    rows = int(height / 30 * 70)
    upper = (70 - rows) // 2
    assert pixels.shape == (1, 70, 70, 3)
    np.testing.assert_allclose(
        pixels[0, upper : upper + rows],
        np.broadcast_to([1, -1 / 255, -1], (rows, 70, 3)),
        atol=1e-6,
    )
    assert not pixels[0, :upper].any() and not pixels[0, upper + rows :].any()


@pytest.mark.parametrize("side", [70, 384])
def test_grids_of_simple_shapes(side):
    assert choose_grid(side, side, side, 9) == (1, 1)
    assert choose_grid(2 * side, side, side, 9) == (1, 2)
    assert choose_grid(side, 3 * side, side, 9) == (3, 1)
    assert choose_grid(3 * side, 3 * side, side, 9) == (3, 3)
    assert choose_grid(3 * side, 3 * side, side, 1) == (1, 1)


# What the original chooses up to Python 3.11. Later versions of sum() round differently.
GRIDS_AT_THE_THRESHOLD = [
    (390, 97, 70, 9, (1, 8)),
    (341, 1364, 70, 9, (8, 1)),
    (3841, 621, 384, 9, (1, 8)),
    (2497, 9988, 384, 9, (6, 1)),
]


@pytest.mark.parametrize("width, height, side, max_partition, expected", GRIDS_AT_THE_THRESHOLD)
def test_covered_areas_are_summed_without_compensation(
    width, height, side, max_partition, expected
):
    assert choose_grid(width, height, side, max_partition) == expected


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([70, 384]), st.integers(1, 12))
def test_the_grid_is_the_original_s_choice(width, height, side, max_partition):
    def ratio(grid):
        covers = []
        for left, upper, right, lower in grid_boxes(width, height, grid):
            w, h = sorted((right - left, lower - upper), reverse=True)
            w, h = (side, h / w * side) if w > side else (w, h)
            covers.append(w * h)
        return functools.reduce(operator.add, covers) / (width * height)

    candidates = [
        (rows, columns)
        for rows in range(1, max_partition + 1)
        for columns in range(1, max_partition + 1)
        if rows * columns <= max_partition
    ]
    ratios = {grid: ratio(grid) for grid in candidates}
    good = [grid for grid in candidates if ratios[grid] > 0.9]
    if good:
        expected = sorted(good, key=lambda g: (g[0] * g[1], -ratios[g]))[0]
    else:
        expected = sorted(candidates, key=lambda g: (-ratios[g], g[0] * g[1]))[0]
    assert choose_grid(width, height, side, max_partition) == expected


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 5), st.integers(1, 5))
def test_grid_boxes_tile_the_image(width, height, rows, columns):
    boxes = grid_boxes(width, height, (rows, columns))
    assert len(boxes) == rows * columns
    counts = np.zeros((height, width), int)
    for left, upper, right, lower in boxes:
        counts[upper:lower, left:right] += 1
    assert (counts == 1).all()


def test_image_placeholder_ids():
    assert image_placeholder_ids((1, 1)) == [-301, -300, -302, -305]
    assert image_placeholder_ids((1, 2)) == [-301, -300, -302, -300, -303, -300, -305]
    assert image_placeholder_ids((2, 1)) == [-301, -300, -302, -300, -304, -300, -305]
    assert image_placeholder_ids((2, 2)) == [
        *[-301, -300, -302],
        *[-300, -303, -300, -304, -300, -303, -300],
        -305,
    ]


@given(st.integers(1, 6), st.integers(1, 6))
def test_one_slot_per_crop(rows, columns):
    cells = rows * columns
    assert image_placeholder_ids((rows, columns)).count(-300) == (1 if cells == 1 else cells + 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_is_converted_to_rgb(mode):
    image = Image.new(mode, (20, 10))
    np.testing.assert_array_equal(
        preprocess_image(image, SETTINGS, 4)[0],
        preprocess_image(image.convert("RGB"), SETTINGS, 4)[0],
    )


def test_a_transparent_palette_keeps_its_colors_without_a_warning():
    image = Image.new("P", (12, 12))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([n % 2 for n in range(144)])
    opaque = image.convert("RGB")
    image.info["transparency"] = bytes([0, 128])
    np.testing.assert_array_equal(
        preprocess_image(image, SETTINGS, 1)[0], preprocess_image(opaque, SETTINGS, 1)[0]
    )


@pytest.mark.parametrize("size", [(300, 2), (2, 300)])
def test_images_that_are_too_thin(size):
    with pytest.raises(ImageError, match=rf"{size[0]} x {size[1]} pixels.*at most 70 times"):
        preprocess_image(Image.new("RGB", size), SETTINGS, 9)


def test_images_without_pixels():
    with pytest.raises(ImageError, match="0 x 4 pixels"):
        preprocess_image(Image.new("RGB", (0, 4)), SETTINGS, 9)


@pytest.mark.parametrize("max_partition", [0, -1, 2.0, True, None])
def test_invalid_max_partition(max_partition):
    with pytest.raises(ImageError, match="max_partition is"):
        preprocess_image(Image.new("RGB", (4, 4)), SETTINGS, max_partition)


def test_max_partition_may_be_a_numpy_integer():
    image = Image.new("RGB", (300, 84))
    assert (
        preprocess_image(image, SETTINGS, np.int64(4))[1]
        == preprocess_image(image, SETTINGS, 4)[1]
        != (1, 1)
    )


def test_a_file_that_fails_at_first_use():
    data = (GOLDEN / "images" / "wide.png").read_bytes()
    with pytest.raises(ImageError, match="mode RGB cannot be decoded"):
        preprocess_image(Image.open(io.BytesIO(data[: len(data) // 2])), SETTINGS, 9)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"do_resize": False}, "do_resize is False"),
        ({"do_rescale": "missing"}, "do_rescale is missing"),
        ({"do_normalize": None}, "do_normalize is None"),
        ({"do_center_crop": True}, "do_center_crop is True"),
        ({"resample": 2}, "resample is 2"),
        ({"size": "missing"}, "size is missing"),
        ({"size": {"height": 70}}, "size: width is missing"),
        ({"size": {"height": 70, "width": 84}}, "width is 84, expected image_size 70"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is"),
        ({"image_mean": "missing"}, "image_mean is missing"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std is .* above 0"),
        ({"rescale_factor": 0}, "rescale_factor is 0"),
    ],
)
def test_unsupported_settings(tmp_path, changes, message):
    fields = json.loads((CHECKPOINT / "preprocessor_config.json").read_text()) | changes
    fields = {key: value for key, value in fields.items() if value != "missing"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=f"preprocessor_config.json.*{message}"):
        ImageProcessorConfig.from_folder(tmp_path, 70)
