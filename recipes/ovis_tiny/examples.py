"""The pictures of the README: `python -m recipes.ovis_tiny.examples examples`.

They are scenes of the test, the first ones from a seed in which no colour comes twice.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from recipes.ovis_tiny.scenes import DIGITS, SQUARE, WIDE, WORDS, Scene, draw, random_scene


def scenes() -> dict[str, Scene]:
    """The pictures' names, and what they show."""
    rng = random.Random("examples")
    return {
        "shapes": _colourful(rng, columns=SQUARE, count=4),
        "word": _colourful(rng, columns=SQUARE, texts=WORDS, count=2),
        "digit": _colourful(rng, columns=SQUARE, texts=DIGITS, count=3),
        "wide": _colourful(rng, columns=WIDE, count=5),
    }


def _colourful(rng: random.Random, **options: Any) -> Scene:
    while True:
        scene = random_scene(rng, "test", **options)
        if len({thing.colour for thing in scene.things}) == len(scene.things):
            return scene


def main() -> None:
    """Read the command line and write the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("folder", type=Path, metavar="DST")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in scenes().items():
        draw(scene).save(folder / f"{name}.png")


if __name__ == "__main__":
    main()
