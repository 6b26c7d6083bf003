"""Generate the data sets of ovis-tiny: `python -m recipes.ovis_tiny.generate_dataset DST`.

The command writes train.jsonl, validation.jsonl and test.jsonl in the dataset format of the
original code, the pictures that they refer to, and
  describe.jsonl   complete descriptions of the training pictures, for the first training stage
  pairs.jsonl      with --pairs: rows that prefer a short answer to the full sentence
The same arguments write the same bytes. No scene occurs in two splits.
"""

import argparse
import json
import multiprocessing
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ovis_jax.errors import count_noun
from recipes.ovis_tiny.dataset_rows import (
    QUESTION_WEIGHTS,
    UNCHANGED_FREQUENCIES,
    SceneRow,
    description_row,
    evaluation_row,
    preference_row,
    training_row,
)
from recipes.ovis_tiny.languages import LANGUAGES
from recipes.ovis_tiny.questions import COLOUR_KINDS, KINDS
from recipes.ovis_tiny.scenes import HELD_OUT_COLOUR, Scene, draw_scene

UNSEEN_PHRASING_ROUNDS = (6, 13, 19)
"""Test rows, out of 20 of the same kind and language, with a phrasing that training lacks."""
IMAGES_PER_FOLDER = 1000
NUM_WORKERS = 2

Lines = dict[str, list[dict[str, Any]]]
"""Lines of each JSON lines file, by the name of the file without ".jsonl"."""


def training_lines(
    folder: Path,
    index: int,
    *,
    seed: int,
    colour: str = "",
    frequencies: Mapping[str, float] = UNCHANGED_FREQUENCIES,
) -> Lines:
    """Draw the pictures of a training row and return its lines.

    Args:
      folder: folder for the pictures.
      index: index of the row.
      seed: seed of the data set.
      colour: colour that every other row asks about.
      frequencies: factors by which kinds of questions are more frequent.
    """
    rng = random.Random(f"{seed} train {colour} {index}")
    row = training_row(rng, colour if index % 2 else "", frequencies)
    line, paths = _draw_row(row, folder, "train", index)
    descriptions = [
        {"id": f"describe-{index}-{number}", "image": path, **description_row(rng, scene).entry}
        for number, (scene, path) in enumerate(zip(row.scenes, paths, strict=True))
    ]
    return {"train": [line], "describe": descriptions}


def evaluation_lines(folder: Path, index: int, *, split: str, seed: int, colour: str = "") -> Lines:
    """Draw the pictures of a "validation" or "test" row and return its line.

    Kinds and languages take turns. See `training_lines` for the other arguments.
    """
    rng = random.Random(f"{seed} {split} {colour} {index}")
    kinds = (*COLOUR_KINDS, "follow_up") if colour else KINDS
    languages = list(LANGUAGES)
    rounds, place = divmod(index, len(kinds) * len(languages))
    unseen = split == "test" and rounds % 20 in UNSEEN_PHRASING_ROUNDS
    kind, language = kinds[place // len(languages)], languages[place % len(languages)]
    row = evaluation_row(rng, split, kind, language, unseen, colour)
    return {split: [_draw_row(row, folder, split, index)[0]]}


def preference_lines(folder: Path, index: int, *, seed: int) -> Lines:
    """Draw the pictures of a preference row and return its line."""
    row = preference_row(random.Random(f"{seed} pairs {index}"))
    return {"pairs": [_draw_row(row, folder, "pairs", index)[0]]}


def _draw_row(
    row: SceneRow, folder: Path, name: str, index: int
) -> tuple[dict[str, Any], list[str]]:
    """Draw a row's pictures; return its line and the paths of the pictures."""
    paths = [_save_picture(scene, folder, name, index, n) for n, scene in enumerate(row.scenes)]
    image = {"image": paths[0] if len(paths) == 1 else paths} if paths else {}
    return {"id": f"{name}-{index}", **image, **row.entry}, paths


def _save_picture(scene: Scene, folder: Path, name: str, index: int, number: int) -> str:
    """Save the picture of a scene; return its path relative to `folder`."""
    path = f"images/{name}/{index // IMAGES_PER_FOLDER:03}/{index:06}-{number}.png"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    draw_scene(scene).save(folder / path)
    return path


def write_dataset(
    folder: Path,
    make_lines: Callable[[Path, int], Lines],
    num_rows: int,
    num_workers: int = NUM_WORKERS,
) -> dict[str, int]:
    """Write JSON lines files and pictures.

    Args:
      folder: folder to write to; created if needed.
      make_lines: draws the pictures of the row with a given index into `folder`, and returns the
        row's lines.
      num_rows: number of rows.
      num_workers: number of processes.

    Returns:
      The number of lines of each file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {}
    counts: dict[str, int] = {}
    try:
        for lines in _map_in_order(partial(make_lines, folder), num_rows, num_workers):
            for name, entries in lines.items():
                if name not in files:
                    files[name] = (folder / f"{name}.jsonl").open("w", encoding="utf-8")
                    counts[name] = 0
                for entry in entries:
                    files[name].write(json.dumps(entry, ensure_ascii=False) + "\n")
                counts[name] += len(entries)
    finally:
        for file in files.values():
            file.close()
    return counts


def _map_in_order(
    make_lines: Callable[[int], Lines], num_rows: int, num_workers: int
) -> Iterator[Lines]:
    if num_workers == 1:
        yield from map(make_lines, range(num_rows))
    else:
        with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
            yield from pool.imap(make_lines, range(num_rows), chunksize=100)


def _parse_frequency(argument: str) -> tuple[str, float]:
    kind, _, factor = argument.partition("=")
    if kind not in QUESTION_WEIGHTS:
        known = ", ".join(QUESTION_WEIGHTS)
        raise argparse.ArgumentTypeError(f"{kind!r} is not a kind of question; use one of {known}")
    return kind, float(factor)


def main() -> None:
    """Parse the command line and write the data sets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DST", help="folder to write to")
    parser.add_argument("--train", type=int, default=100_000, help="number of training rows")
    parser.add_argument("--validation", type=int, default=400, help="number of validation rows")
    parser.add_argument("--test", type=int, default=1300, help="number of test rows")
    parser.add_argument("--pairs", type=int, default=0, help="number of preference rows")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data set")
    parser.add_argument("--workers", type=int, default=NUM_WORKERS, help="number of processes")
    parser.add_argument(
        "--colour",
        choices=[HELD_OUT_COLOUR],
        default="",
        help="colour to ask about in every second training row and in all other rows",
    )
    parser.add_argument(
        "--frequency",
        type=_parse_frequency,
        nargs="+",
        default=[],
        metavar="KIND=FACTOR",
        help="factors by which kinds of question are more frequent in training",
    )
    args = parser.parse_args()
    shared = {"seed": args.seed, "colour": args.colour}
    counts: dict[str, int] = {}
    for make_lines, num_rows in (
        (partial(training_lines, **shared, frequencies=dict(args.frequency)), args.train),
        (partial(evaluation_lines, split="validation", **shared), args.validation),
        (partial(evaluation_lines, split="test", **shared), args.test),
        (partial(preference_lines, seed=args.seed), args.pairs),
    ):
        counts |= write_dataset(args.folder, make_lines, num_rows, args.workers)
    for name, count in counts.items():
        print(f"{args.folder / name}.jsonl: {count_noun(count, 'row')}")


if __name__ == "__main__":
    main()
