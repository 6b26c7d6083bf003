"""How often is ovis-tiny right? `python -m recipes.ovis_tiny.score MODEL TEST.jsonl`.

Greedy answers of `ovis_jax.generate`, compared letter by letter with the one answer that is right;
shares by kind of question, by language, and for phrasings that training did not have.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from ovis_jax.loading import LoadedOvis, load
from ovis_jax.training.evaluation import Answer, answer_rows, shares
from ovis_jax.training.rows import read_rows, read_values

Shares = dict[str, dict[str, float]]
"""Of right answers: by the kind of question, then "all", "new phrasing" or the language."""

ALL = "all"
NEW = "new phrasing"
MEAN = "mean of kinds"
BATCH = 64
"""Rows answered at once: large, so that few shapes are compiled."""


def answers(ovis: LoadedOvis, path: Path) -> Iterator[tuple[Answer, Mapping[str, Any]]]:
    """Every row's answer, and the row's line of the file.

    Raises:
      DataError: the file cannot be used.
    """
    lines = read_values(path)
    rows = read_rows([path]).rows
    by_name = {row.name: line for row, line in zip(rows, lines, strict=True)}
    for answer in answer_rows(ovis.processor, ovis.model, ovis.params, rows, batch=BATCH):
        yield answer, by_name[answer.row.name]


def shares_by_kind(
    found: Sequence[tuple[Answer, Mapping[str, Any]]], *, short: bool = False
) -> Shares:
    """The share of right answers of each kind, and the mean of the kinds.

    With `short`, the short form of the right answer is right too.
    """
    columns: dict[str, list[tuple[str, bool]]] = {}
    for answer, line in found:
        right = answer.right or (short and answer.text.strip() == line["short"])
        names = [ALL, line["language"], *([NEW] if line["paraphrase"] else [])]
        columns.setdefault(line["kind"], []).extend((name, right) for name in names)
    result = {kind: shares(columns[kind]) for kind in sorted(columns)}
    names = sorted({column for columns in result.values() for column in columns})
    kinds = list(result.values())
    result[MEAN] = {
        name: float(np.mean([kind[name] for kind in kinds if name in kind])) for name in names
    }
    return result


def table(result: Shares) -> Table:
    """The shares as a table."""
    names = list(result[MEAN])
    shown = Table("kind", *(Column(name, justify="right") for name in names))
    for kind, columns in result.items():
        if kind == MEAN:
            shown.add_section()
        cells = (f"{columns[name]:.1%}" if name in columns else "" for name in names)
        shown.add_row(kind, *cells)
    return shown


def main() -> None:
    """Read the command line, answer, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("test", type=Path, metavar="TEST.jsonl")
    parser.add_argument("--adapters", type=Path, help="a folder of low-rank adapters")
    parser.add_argument("--short", action="store_true", help="short answers are right too")
    parser.add_argument("--json", type=Path, help="a file to write the shares to")
    parser.add_argument("--wrong", type=int, default=0, help="print so many wrong answers")
    args = parser.parse_args()
    ovis = load(args.model, adapters=args.adapters)
    total = len(read_values(args.test))
    console = Console(stderr=True)
    progress = track(
        answers(ovis, args.test),
        "answering",
        total,
        console=console,
        disable=not sys.stderr.isatty(),
    )
    found = list(progress)
    result = shares_by_kind(found, short=args.short)
    Console().print(table(result))
    print(f"{np.mean([len(answer.tokens) for answer, _ in found]):.2f} tokens an answer")
    for answer, line in [pair for pair in found if not pair[0].right][: args.wrong]:
        asked = line["conversations"][-2]["value"].replace("\n", " ")
        print(f"{line['id']}: {asked} -> {answer.text!r}, expected {answer.expected!r}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
