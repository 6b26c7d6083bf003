"""A heat map of the entropy of visual tokens, which shows where in an image the model is uncertain.

This module imports matplotlib, which the extra `train` installs, so import it only when needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from ovis_jax.words.crop_regions import CropRegion

IMAGE_WIDTH_INCHES = 4.0
COLORMAP = "magma"


@dataclass(frozen=True)
class ImageEntropy:
    """An image and the entropy of its visual tokens.

    Attributes:
      title: Title of the image in the figure.
      image: The image.
      regions: Regions of the image's I crops.
      entropy: Entropy of the M visual tokens in each crop, float32 [I, M], in nats.
    """

    title: str
    image: Image.Image
    regions: Sequence[CropRegion]
    entropy: np.ndarray


def plot_entropy(images: Sequence[ImageEntropy]) -> Figure:
    """Plot one row per image: the image, and the entropy in its cells and in its full-image crop.

    All heat maps have the same scale and are drawn over grayscale images.
    """
    columns = 3 if any(len(one.regions) > 1 for one in images) else 2
    heights = [IMAGE_WIDTH_INCHES * one.image.height / one.image.width + 0.4 for one in images]
    size = (columns * IMAGE_WIDTH_INCHES + 1, sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(images), columns, squeeze=False, height_ratios=heights)
    values = np.concatenate([one.entropy.ravel() for one in images])
    limits = float(values.min()), float(values.max())
    for row, one in zip(grid, images, strict=True):
        first_cell = min(len(one.regions) - 1, 1)
        panels = [
            (one.title, range(0)),
            ("entropy, cells" if first_cell else "entropy", range(first_cell, len(one.regions))),
            ("entropy, full image", range(first_cell)),
        ]
        for column, (axes, (title, crops)) in enumerate(zip(row, panels, strict=False)):
            axes.set_axis_off()
            if column and not crops:
                continue
            axes.set_title(title, fontsize="medium")
            width, height = one.image.size
            pixels = one.image.convert("L" if column else "RGB")
            axes.imshow(pixels, cmap="gray", extent=(0, width, height, 0))
            for crop in crops:
                _overlay_heatmap(axes, one.regions[crop], one.entropy[crop], limits)
            axes.set(xlim=(0, width), ylim=(height, 0))
    heatmap = grid[0, 1].images[-1]
    figure.colorbar(heatmap, ax=grid, shrink=0.8, label="entropy (nats)")
    return figure


def _overlay_heatmap(
    axes: Axes, region: CropRegion, entropy: np.ndarray, limits: tuple[float, float]
) -> None:
    left, upper, right, lower = region.padded_box
    heatmap = axes.imshow(
        entropy.reshape(region.tokens_per_side, region.tokens_per_side),
        extent=(left, right, lower, upper),
        cmap=COLORMAP,
        vmin=limits[0],
        vmax=limits[1],
        alpha=0.6,
    )
    x0, y0, x1, y1 = region.box
    heatmap.set_clip_path(Rectangle((x0, y0), x1 - x0, y1 - y0, transform=axes.transData))
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white"))
