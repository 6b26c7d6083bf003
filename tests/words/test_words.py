"""Where tokens lie in a picture, the heat map of them, and the command."""

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
from ovis_jax.inputs.image import choose_grid
from ovis_jax.words.figure import Picture, entropy_figure
from ovis_jax.words.places import places

TINY = presets.tiny().visual_tokenizer  # crops of 70 pixels, 5 x 5 patches, 3 x 3 tokens


def test_a_square_picture_is_covered_by_its_tokens():
    """5 patches are 3 blocks of 2: the last block reaches 14 of 84 pixels beyond the picture."""
    (place,) = places(140, 140, (1, 1), TINY)
    assert place.box == (0, 0, 140, 140) and place.side == 3
    assert place.extent == (0, 0, 168, 168)


def test_a_wide_crop_lies_in_the_middle_of_its_square():
    (place,) = places(140, 70, (1, 1), TINY)
    left, upper, right, lower = place.extent
    assert (left, right) == (0, 168)
    # The square shows 140 x 140 pixels, of which 35 above the picture are none of it.
    assert upper == pytest.approx(-35, abs=2) and lower == pytest.approx(133, abs=2)


def test_cells_lie_where_they_were_cut():
    whole, *cells = places(200, 100, (1, 2), TINY)
    assert whole.box == (0, 0, 200, 100)
    assert [cell.box for cell in cells] == [(0, 0, 100, 100), (100, 0, 200, 100)]
    assert [cell.extent[:2] for cell in cells] == [(0, 0), (100, 0)]
    assert all(cell.extent[2] - cell.extent[0] == pytest.approx(120) for cell in cells)


def test_the_heat_lies_on_the_picture():
    """A token of much entropy makes its part of the picture bright, and no other part."""
    image = Image.new("RGB", (200, 100), "black")
    placed = places(200, 100, (1, 2), TINY)
    entropy = np.zeros((3, 9), np.float32)
    entropy[2, 0] = 5.0  # the upper left token of the right cell
    figure = entropy_figure([Picture("black", image, placed, entropy)])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].sum(axis=-1)
    axes = figure.axes[1]

    def seen(x: float, y: float) -> int:
        column, row = axes.transData.transform((x, y))
        return int(pixels[pixels.shape[0] - round(row), round(column)])

    assert seen(120, 20) > 200 + seen(120, 60)
    assert seen(120, 60) == seen(20, 20) == seen(180, 20)
    titles = [axes.get_title() for axes in figure.axes[:3]]
    assert titles == ["black", "entropy, cells", "entropy, whole"]


def test_one_crop_is_drawn_once_beside_pictures_of_several():
    pictures = [
        Picture(name, Image.new("RGB", size), placed, np.ones((len(placed), 9), np.float32))
        for name, size, placed in [
            ("wide", (200, 100), places(200, 100, (1, 2), TINY)),
            ("square", (70, 70), places(70, 70, (1, 1), TINY)),
        ]
    ]
    figure = entropy_figure(pictures)
    drawn = [len(axes.images) for axes in figure.axes[:6]]
    assert drawn == [1, 3, 2, 1, 2, 0]


def test_the_command_draws_and_lists(golden, tmp_path):
    wide, square = (str(golden / f"images/{name}.png") for name in ("wide", "square"))
    out = tmp_path / "words.png"
    call = ["words", "--image", wide, "--image", square, "--out", str(out), "--top", "4"]
    result = CliRunner().invoke(app, [*call, "--max-partition", "2"], catch_exceptions=False)
    assert result.exit_code == 0
    with Image.open(out) as drawn:
        assert drawn.width > 1000
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
    assert "% of their visual words' probability" in result.stdout


def test_bad_requests(golden, tmp_path, monkeypatch):
    image = str(golden / "images/square.png")

    def refused(*arguments: str, kind: type = OvisError) -> str:
        result = CliRunner().invoke(app, ["words", *arguments])
        assert isinstance(result.exception, kind), result
        return str(result.exception)

    out = ["--out", str(tmp_path / "words.png")]
    assert "3 images" in refused(*["--image", image] * 3, *out)
    assert "words.xyz" in refused("--image", image, "--out", "words.xyz")
    assert "none.png" in refused("--image", "none.png", *out, kind=ImageError)
    assert "k is 0" in refused("--image", image, *out, "--top", "0")
    monkeypatch.delitem(sys.modules, "ovis_jax.words.figure")
    monkeypatch.delattr(ovis_jax.words, "figure")
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    assert "ovis-jax[train]" in refused("--image", image, *out)
    assert not (tmp_path / "words.png").exists()
