"""Crop regions, the entropy heat map, and the command `ovis-jax words`."""

import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from typer.testing import CliRunner

import ovis_jax.words
from ovis_jax import presets
from ovis_jax.cli import app
from ovis_jax.errors import ImageError, OvisError
from ovis_jax.inputs.image_processing import choose_grid
from ovis_jax.words.crop_regions import crop_regions
from ovis_jax.words.entropy_heatmap import ImageEntropy, plot_entropy

TINY = presets.tiny().visual_tokenizer  # crops of 70 pixels, 5 x 5 patches, 3 x 3 tokens


def test_the_tokens_of_a_square_image_cover_it():
    """5 patches make 3 blocks of 2, so the last block exceeds the image by 14 of 84 pixels."""
    (region,) = crop_regions(140, 140, (1, 1), TINY)
    assert region.box == (0, 0, 140, 140) and region.tokens_per_side == 3
    assert region.padded_box == (0, 0, 168, 168)


def test_a_wide_crop_is_centered_in_its_square():
    (region,) = crop_regions(140, 70, (1, 1), TINY)
    left, upper, right, lower = region.padded_box
    assert (left, right) == (0, 168)
    # The square covers 140 x 140 pixels, with 35 pixels of padding above the image.
    assert upper == pytest.approx(-35, abs=2) and lower == pytest.approx(133, abs=2)


def test_cells_follow_the_full_image():
    full, *cells = crop_regions(200, 100, (1, 2), TINY)
    assert full.box == (0, 0, 200, 100)
    assert [cell.box for cell in cells] == [(0, 0, 100, 100), (100, 0, 200, 100)]
    assert [cell.padded_box[:2] for cell in cells] == [(0, 0), (100, 0)]
    widths = [cell.padded_box[2] - cell.padded_box[0] for cell in cells]
    assert widths == pytest.approx([120, 120])


def test_the_heat_map_is_aligned_with_the_image():
    """A token with high entropy brightens its own part of the image and no other part."""
    image = Image.new("RGB", (200, 100), "black")
    entropy = np.zeros((3, 9), np.float32)
    entropy[2, 0] = 5.0  # the upper left token of the right cell
    regions = crop_regions(200, 100, (1, 2), TINY)
    figure = plot_entropy([ImageEntropy("black", image, regions, entropy)])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].sum(axis=-1)
    axes = figure.axes[1]

    def brightness(x: float, y: float) -> int:
        column, row = axes.transData.transform((x, y))
        return int(pixels[pixels.shape[0] - round(row), round(column)])

    assert brightness(120, 20) > 200 + brightness(120, 60)
    assert brightness(120, 60) == brightness(20, 20) == brightness(180, 20)
    titles = [axes.get_title() for axes in figure.axes[:3]]
    assert titles == ["black", "entropy, cells", "entropy, full image"]


def test_an_image_of_one_crop_leaves_the_third_column_empty():
    images = [
        ImageEntropy(name, Image.new("RGB", size), regions, np.ones((len(regions), 9), np.float32))
        for name, size, regions in [
            ("wide", (200, 100), crop_regions(200, 100, (1, 2), TINY)),
            ("square", (70, 70), crop_regions(70, 70, (1, 1), TINY)),
        ]
    ]
    figure = plot_entropy(images)
    drawn = [len(axes.images) for axes in figure.axes[:6]]
    assert drawn == [1, 3, 2, 1, 2, 0]


@pytest.mark.slow
def test_the_command_draws_and_lists(golden, tmp_path):
    wide, square = (str(golden / f"images/{name}.png") for name in ("wide", "square"))
    out = tmp_path / "words.png"
    call = ["words", "--image", wide, "--image", square, "--heatmap", str(out), "--top", "4"]
    result = CliRunner().invoke(app, [*call, "--max-partition", "2"], catch_exceptions=False)
    assert result.exit_code == 0
    with Image.open(out) as figure:
        assert figure.width > 1000
    with Image.open(wide) as image:
        grid = choose_grid(image.width, image.height, 84, 2)
    crops = 1 + grid[0] * grid[1]
    assert grid != (1, 1)
    lines = [line.split("│")[1:-1] for line in result.stdout.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert cells[0][:3] == ["wide.png", str(crops), str(9 * crops)]
    assert 0 < float(cells[0][3]) <= np.log(256) + 1e-3 and 1 <= float(cells[0][4]) <= 256
    shared = cells[2:]
    assert len(shared) == 4 and all(0 <= int(row[0]) < 251 for row in shared)
    least = [min(float(x.rstrip("%")) for x in row[1:3]) for row in shared]
    assert least == sorted(least, reverse=True) and least[0] > 0
    assert "% of the probability" in result.stdout


def test_bad_requests(golden, tmp_path, monkeypatch):
    image = str(golden / "images/square.png")

    def message_of(*arguments: str, kind: type = OvisError) -> str:
        result = CliRunner().invoke(app, ["words", *arguments])
        assert isinstance(result.exception, kind), result
        return str(result.exception)

    out = ["--heatmap", str(tmp_path / "words.png")]
    assert "--image is given 3 times" in message_of(*["--image", image] * 3, *out)
    assert "--heatmap words.xyz: " in message_of("--image", image, "--heatmap", "words.xyz")
    assert "none.png" in message_of("--image", "none.png", *out, kind=ImageError)
    assert "k is 0" in message_of("--image", image, *out, "--top", "0")
    monkeypatch.delitem(sys.modules, "ovis_jax.words.entropy_heatmap")
    monkeypatch.delattr(ovis_jax.words, "entropy_heatmap")
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    assert "pip install '.[train]'" in message_of("--image", image, *out)
    assert not (tmp_path / "words.png").exists()
