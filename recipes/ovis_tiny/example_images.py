"""Draw the pictures of the README: `python -m recipes.ovis_tiny.example_images examples`.

The scenes belong to the test set. They are the first from a seed in which all colours differ.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from recipes.ovis_tiny.scenes import DIGITS, SQUARE, WIDE, WORDS, Scene, draw_scene, random_scene


def example_scenes() -> dict[str, Scene]:
    """Return the scene of each picture by name."""
    rng = random.Random("examples")
    return {
        "shapes": _scene_of_distinct_colours(rng, columns=SQUARE, count=4),
        "word": _scene_of_distinct_colours(rng, columns=SQUARE, texts=WORDS, count=2),
        "digit": _scene_of_distinct_colours(rng, columns=SQUARE, texts=DIGITS, count=3),
        "wide": _scene_of_distinct_colours(rng, columns=WIDE, count=5),
    }


def _scene_of_distinct_colours(rng: random.Random, **options: Any) -> Scene:
    while True:
        scene = random_scene(rng, "test", **options)
        if len({thing.colour for thing in scene.things}) == len(scene.things):
            return scene


def main() -> None:
    """Parse the command line and write the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("folder", type=Path, metavar="DST")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in example_scenes().items():
        draw_scene(scene).save(folder / f"{name}.png")


if __name__ == "__main__":
    main()
