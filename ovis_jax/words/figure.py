"""The heat map: how sure the model is of the visual words of each part of a picture.

Needs matplotlib, which is in the extra `train`: import this module only where it is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from ovis_jax.words.places import Place

WIDTH = 4.0
"""Of a picture in the figure, in inches."""
COLOURS = "magma"


@dataclass(frozen=True)
class Picture:
    """What is drawn in a row of the figure.

    Attributes:
      name: its heading.
      image: the picture itself.
      places: where its crops lie.
      entropy: float32 [I, M], in nats, of the tokens of these crops.
    """

    name: str
    image: Image.Image
    places: Sequence[Place]
    entropy: np.ndarray


def entropy_figure(pictures: Sequence[Picture]) -> Figure:
    """Draw each picture, the entropy over its cells, and apart from them over its whole.

    All heat maps have one scale, from the least entropy to the most, over pictures without colour.
    """
    columns = 3 if any(len(picture.places) > 1 for picture in pictures) else 2
    heights = [WIDTH * picture.image.height / picture.image.width + 0.4 for picture in pictures]
    figure = Figure(figsize=(columns * WIDTH + 1, sum(heights)), layout="constrained")
    grid = figure.subplots(len(pictures), columns, squeeze=False, height_ratios=heights)
    values = np.concatenate([picture.entropy.ravel() for picture in pictures])
    limits = float(values.min()), float(values.max())
    for row, picture in zip(grid, pictures, strict=True):
        first = min(len(picture.places) - 1, 1)  # of several crops the first is the whole picture
        titles = [picture.name, "entropy" if first == 0 else "entropy, cells", "entropy, whole"]
        shown = [range(0), range(first, len(picture.places)), range(first)]
        for axes, title, crops in zip(row, titles, shown[:columns], strict=False):
            axes.set_axis_off()
            if title != picture.name and not crops:
                continue
            axes.set_title(title, fontsize="medium")
            mode = "L" if crops else "RGB"
            axes.imshow(picture.image.convert(mode), cmap="gray", extent=_whole(picture.image))
            for crop in crops:
                _lay(axes, picture.places[crop], picture.entropy[crop], limits)
            _frame(axes, picture.image)
    scale = grid[0, 1].images[-1]
    figure.colorbar(scale, ax=grid, shrink=0.8, label="entropy (nats)")
    return figure


def _lay(axes: Axes, place: Place, entropy: np.ndarray, limits: tuple[float, float]) -> None:
    """The heat map of a crop over the part of the picture that it shows."""
    left, upper, right, lower = place.extent
    tokens = entropy.reshape(place.side, place.side)
    heat = axes.imshow(
        tokens,
        extent=(left, right, lower, upper),
        cmap=COLOURS,
        vmin=limits[0],
        vmax=limits[1],
        alpha=0.6,
    )
    x0, y0, x1, y1 = place.box
    heat.set_clip_path(Rectangle((x0, y0), x1 - x0, y1 - y0, transform=axes.transData))
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white"))


def _whole(image: Image.Image) -> tuple[float, float, float, float]:
    return (0, image.width, image.height, 0)


def _frame(axes: Axes, image: Image.Image) -> None:
    axes.set_xlim(0, image.width)
    axes.set_ylim(image.height, 0)
