"""Scenes of coloured shapes, digits and words in a grid of cells, and their pictures.

A cell has the size of the region that one visual token of ovis-tiny covers. Only words extend over
several cells. A square picture is one crop; a wide picture is two.
"""

import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

CELL = 28
"""Side of a cell in pixels."""
ROWS = 3
SQUARE, WIDE = 3, 6
"""Number of columns of a square and of a wide picture."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
SIZES = ("big", "small")
DIGITS = tuple("0123456789")
WORDS = tuple(
    "TREE FISH MOON LAMP BOOK BIRD RAIN SHOE CAKE DOOR "
    "FROG GOLD HAND KITE LEAF NEST ROAD SHIP TENT WOLF".split()
)

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black")
HELD_OUT_COLOUR = "pink"
"""Drawn only on request, so that fine-tuning can teach a new colour."""

SPLITS = ("test", "validation", "train")
"""The content of a scene determines its split: see `split_of_scene`."""

RADII = {"big": 12.0, "small": 6.5}
JITTER = 2
SCALE = 4
"""Factor by which pictures are drawn larger and then reduced, for smooth edges."""
STROKE = 2
"""Additional stroke width of letters on each side, at SCALE."""

_RGB = {
    "red": (218, 38, 38),
    "green": (40, 160, 65),
    "blue": (40, 85, 215),
    "yellow": (242, 208, 35),
    "purple": (140, 55, 170),
    "orange": (246, 135, 28),
    "black": (32, 32, 36),
    "pink": (247, 130, 190),
}

Point = tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """A shape in a cell.

    `split_of_scene` hashes the names of this class and of its fields, so do not rename them.
    """

    shape: str
    colour: str
    size: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """The content of a picture, and a seed for the details of the drawing.

    Attributes:
      columns: SQUARE or WIDE.
      things: things in reading order, each in its own cell.
      text: a digit, a word, or "".
      text_row: row of the text.
      text_column: column of a digit, or first of the SQUARE columns of a word.
      seed: seed of the background, the jitter and the exact colours.
    """

    columns: int
    things: tuple[Thing, ...]
    text: str = ""
    text_row: int = 0
    text_column: int = 0
    seed: int = 0

    @property
    def digit(self) -> str:
        """The digit, or ""."""
        return self.text if self.text in DIGITS else ""

    @property
    def word(self) -> str:
        """The word, or ""."""
        return self.text if self.text in WORDS else ""


def split_of_scene(scene: Scene) -> str:
    """Return the split of a scene, regardless of its seed: 5 % test and 5 % validation."""
    content = repr((scene.columns, scene.things, scene.text, scene.text_row, scene.text_column))
    return SPLITS[min(zlib.crc32(content.encode()) % 20, 2)]


def random_scene(
    rng: random.Random,
    split: str,
    *,
    columns: int = SQUARE,
    count: int | None = None,
    texts: Sequence[str] = (),
    colour: str = "",
) -> Scene:
    """Make a random scene of a split.

    Args:
      rng: source of all random choices.
      split: one of SPLITS.
      columns: SQUARE or WIDE.
      count: number of things; by default 1 to 5 in a square picture, 2 to 6 in a wide one, and at
        most 3 together with a word.
      texts: digits or words of which the picture shows one.
      colour: colour of at least one thing.
    """
    while True:
        scene = _any_scene(rng, columns, count, texts, colour)
        if split_of_scene(scene) == split:
            return scene


def _any_scene(
    rng: random.Random, columns: int, count: int | None, texts: Sequence[str], colour: str
) -> Scene:
    cells = [(row, column) for row in range(ROWS) for column in range(columns)]
    text, text_row, text_column = "", 0, 0
    if texts:
        text = rng.choice(texts)
        text_row, text_column = rng.choice(cells)
        if len(text) > 1:
            text_column -= text_column % SQUARE
        covered = SQUARE if len(text) > 1 else 1
        for column in range(text_column, text_column + covered):
            cells.remove((text_row, column))
    if count is None:
        few, many = (1, 5) if columns == SQUARE else (2, 6)
        count = rng.randint(few, 3 if len(text) > 1 else many)
    # With few colours or shapes, counts exceed one and questions need both properties.
    colours = COLOURS if rng.random() < 0.5 else rng.sample(COLOURS, rng.randint(2, 3))
    shapes = SHAPES if rng.random() < 0.65 else rng.sample(SHAPES, rng.randint(2, 3))
    chosen = [rng.choice(colours) for _ in range(count)]
    if colour:
        for i in rng.sample(range(count), rng.randint(1, min(2, count))):
            chosen[i] = colour
    things = tuple(
        Thing(rng.choice(shapes), chosen[i], rng.choice(SIZES), *cell)
        for i, cell in enumerate(sorted(rng.sample(cells, count)))
    )
    return Scene(columns, things, text, text_row, text_column, rng.getrandbits(32))


def draw_scene(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of ROWS x columns cells of CELL pixels."""
    rng = random.Random(scene.seed)
    grey = rng.randint(222, 248)
    background = tuple(grey + rng.randint(-7, 7) for _ in range(3))
    size = (scene.columns * CELL * SCALE, ROWS * CELL * SCALE)
    image = Image.new("RGB", size, background)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        radius = RADII[thing.size] * rng.uniform(0.94, 1.0)
        x, y = _jittered(rng, thing.column + 0.5, thing.row + 0.5)
        colour = tuple(
            min(255, max(0, value + rng.randint(-10, 10))) for value in _RGB[thing.colour]
        )
        _DRAW[thing.shape](pen, x * SCALE, y * SCALE, radius * SCALE, colour, background)
    if scene.text:
        cells = 1 if scene.digit else SQUARE
        font = _font(scene.text, cells)
        x, y = _jittered(rng, scene.text_column + cells / 2, scene.text_row + 0.5)
        ink = tuple(rng.randint(15, 60) for _ in range(3))
        left, top, right, bottom = font.getbbox(scene.text, stroke_width=STROKE)
        corner = (x * SCALE - (left + right) / 2, y * SCALE - (top + bottom) / 2)
        pen.text(corner, scene.text, fill=ink, font=font, stroke_width=STROKE)
    return image.reduce(SCALE)


def _jittered(rng: random.Random, column: float, row: float) -> Point:
    """A point in pixels with random jitter."""
    return (
        column * CELL + rng.uniform(-JITTER, JITTER),
        row * CELL + rng.uniform(-JITTER, JITTER),
    )


_FONTS: dict[str, ImageFont.FreeTypeFont] = {}


def _font(text: str, cells: int) -> ImageFont.FreeTypeFont:
    """Pillow's default font in the largest size at which the text fits into its cells."""
    if text not in _FONTS:
        width, height = (cells * CELL - 6) * SCALE, 23 * SCALE
        points = 160
        while True:
            font = ImageFont.load_default(size=points)
            if not isinstance(font, ImageFont.FreeTypeFont):
                raise RuntimeError("Pillow has no FreeType support, which drawing letters requires")
            left, top, right, bottom = font.getbbox(text, stroke_width=STROKE)
            if right - left <= width and bottom - top <= height:
                break
            points -= 2
        _FONTS[text] = font
    return _FONTS[text]


Colour = tuple[int, ...]
Pen = ImageDraw.ImageDraw


def _circle(pen: Pen, x: float, y: float, r: float, colour: Colour, _: Colour) -> None:
    pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _ring(pen: Pen, x: float, y: float, r: float, colour: Colour, background: Colour) -> None:
    hole = 0.58 * r
    pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)


def _cross(pen: Pen, x: float, y: float, r: float, colour: Colour, _: Colour) -> None:
    arm = 0.32 * r
    pen.rectangle((x - arm, y - r, x + arm, y + r), fill=colour)
    pen.rectangle((x - r, y - arm, x + r, y + arm), fill=colour)


def _polygon(points: Sequence[Point]) -> Callable[..., None]:
    """Return a function that draws a polygon; corners are given for radius 1."""

    def pen_polygon(pen: Pen, x: float, y: float, r: float, colour: Colour, _: Colour) -> None:
        pen.polygon([(x + r * across, y + r * down) for across, down in points], fill=colour)

    return pen_polygon


def _around(radii: Sequence[float]) -> list[Point]:
    """Corners at equal angles, clockwise from the top."""
    angles = [2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def _heart() -> list[Point]:
    angles = [2 * math.pi * i / 60 for i in range(60)]
    across = [math.sin(a) ** 3 for a in angles]
    down = [
        -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16
        for a in angles
    ]
    return [(x, y - 0.13) for x, y in zip(across, down, strict=True)]


_DRAW: dict[str, Callable[..., None]] = {
    "circle": _circle,
    "square": _polygon([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]),
    "triangle": _polygon([(0, -0.95), (0.98, 0.8), (-0.98, 0.8)]),
    "star": _polygon(_around([1.0, 0.42] * 5)),
    "cross": _cross,
    "ring": _ring,
    "heart": _polygon(_heart()),
    "diamond": _polygon([(0, -1), (0.68, 0), (0, 1), (-0.68, 0)]),
}
