"""Draw the data sets of ovis-tiny: `python -m recipes.ovis_tiny.draw_data DST`.

DST then holds train.jsonl, validation.jsonl and test.jsonl in the original's dataset format, the
pictures they name, and
  describe.jsonl   the same training pictures, all that each shows said: a first stage of training
  pairs.jsonl      with --pairs: rows that prefer a short answer to the full sentence
The same arguments write the same bytes. A scene of one split never stands in another.
"""

import argparse
import json
import multiprocessing
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from recipes.ovis_tiny.languages import LANGUAGES
from recipes.ovis_tiny.questions import COLOUR_KINDS, KINDS
from recipes.ovis_tiny.rows import (
    NO_MORE,
    WEIGHTS,
    Row,
    listing_row,
    preference_row,
    scored_row,
    training_row,
)
from recipes.ovis_tiny.scenes import HELD_OUT_COLOUR, Scene, draw

UNSEEN_ROUNDS = (6, 13, 19)
"""Which of 20 test rows of the same kind and language have a phrasing that training lacks."""
ROWS_A_FOLDER = 1000
WORKERS = 2

Lines = dict[str, list[dict[str, Any]]]
"""The lines of each file, by the name of the file without ".jsonl"."""


def train_lines(
    folder: Path,
    index: int,
    *,
    seed: int,
    colour: str = "",
    more: Mapping[str, float] = NO_MORE,
) -> Lines:
    """Draw training row `index` and give its lines; with a colour, every other row is about it."""
    rng = random.Random(f"{seed} train {colour} {index}")
    row = training_row(rng, colour if index % 2 else "", more)
    line, names = _finish(row, folder, "train", index)
    listed = [
        {"id": f"describe-{index}-{number}", "image": name, **listing_row(rng, scene).entry}
        for number, (scene, name) in enumerate(zip(row.scenes, names, strict=True))
    ]
    return {"train": [line], "describe": listed}


def scored_lines(folder: Path, index: int, *, split: str, seed: int, colour: str = "") -> Lines:
    """Draw row `index` of "validation" or "test": kinds and languages take turns."""
    rng = random.Random(f"{seed} {split} {colour} {index}")
    kinds = (*COLOUR_KINDS, "follow_up") if colour else KINDS
    languages = list(LANGUAGES)
    rounds, place = divmod(index, len(kinds) * len(languages))
    unseen = split == "test" and rounds % 20 in UNSEEN_ROUNDS
    kind, language = kinds[place // len(languages)], languages[place % len(languages)]
    row = scored_row(rng, split, kind, language, unseen, colour)
    return {split: [_finish(row, folder, split, index)[0]]}


def pair_lines(folder: Path, index: int, *, seed: int) -> Lines:
    """Draw row `index` of the preferences."""
    row = preference_row(random.Random(f"{seed} pairs {index}"))
    return {"pairs": [_finish(row, folder, "pairs", index)[0]]}


def _finish(row: Row, folder: Path, name: str, index: int) -> tuple[dict[str, Any], list[str]]:
    """Draw a row's pictures; the row as a line, and the names of its pictures."""
    names = [_save(scene, folder, name, index, n) for n, scene in enumerate(row.scenes)]
    image = {"image": names[0] if len(names) == 1 else names} if names else {}
    return {"id": f"{name}-{index}", **image, **row.entry}, names


def _save(scene: Scene, folder: Path, name: str, index: int, number: int) -> str:
    """Draw a picture into a file below `folder`; its path from there."""
    path = f"images/{name}/{index // ROWS_A_FOLDER:03}/{index:06}-{number}.png"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    draw(scene).save(folder / path)
    return path


def write(
    folder: Path, make: Callable[[Path, int], Lines], number: int, workers: int = WORKERS
) -> dict[str, int]:
    """Write the JSON lines files of `number` rows; how many lines each got.

    Args:
      folder: where they are written, made if need be.
      make: draws the pictures of a row into `folder` and gives the row's lines.
      number: how many rows.
      workers: how many processes draw.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {}
    counts: dict[str, int] = {}
    try:
        for lines in _drawn(partial(make, folder), number, workers):
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


def _drawn(make: Callable[[int], Lines], number: int, workers: int) -> Iterator[Lines]:
    """The lines of every row, in order."""
    if workers == 1:
        yield from map(make, range(number))
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            yield from pool.imap(make, range(number), chunksize=100)


def _factor(argument: str) -> tuple[str, float]:
    kind, _, times = argument.partition("=")
    if kind not in WEIGHTS:
        raise argparse.ArgumentTypeError(f"{kind} is not a kind of {', '.join(WEIGHTS)}")
    return kind, float(times)


def main() -> None:
    """Read the command line and write the data sets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DST")
    parser.add_argument("--train", type=int, default=100_000, help="rows of train.jsonl")
    parser.add_argument("--validation", type=int, default=400, help="rows of validation.jsonl")
    parser.add_argument("--test", type=int, default=1300, help="rows of test.jsonl")
    parser.add_argument("--pairs", type=int, default=0, help="rows of pairs.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes that draw")
    parser.add_argument(
        "--colour",
        choices=[HELD_OUT_COLOUR],
        default="",
        help="ask about things of this colour: in every other training row, and in all that score",
    )
    parser.add_argument(
        "--more",
        type=_factor,
        nargs="+",
        default=[],
        metavar="KIND=TIMES",
        help="how many times as often as usual a kind is asked in training",
    )
    args = parser.parse_args()
    shared = {"seed": args.seed, "colour": args.colour}
    counts: dict[str, int] = {}
    for make, number in (
        (partial(train_lines, **shared, more=dict(args.more)), args.train),
        (partial(scored_lines, split="validation", **shared), args.validation),
        (partial(scored_lines, split="test", **shared), args.test),
        (partial(pair_lines, seed=args.seed), args.pairs),
    ):
        counts |= write(args.folder, make, number, args.workers)
    for name, count in counts.items():
        print(f"{args.folder / name}.jsonl: {count} rows")


if __name__ == "__main__":
    main()
