"""Measure the accuracy of ovis-tiny on its test set.

`python -m recipes.ovis_tiny.measure_accuracy MODEL TEST.jsonl`. Greedy answers of
`ovis_jax.generate` are correct if they equal the expected answer exactly. Accuracy is reported by
kind of question, by language, and for phrasings that training lacks.
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

from ovis_jax.evaluation.batch_answering import ScoredAnswer, accuracy_by_kind, answer_rows
from ovis_jax.inputs.dataset import read_dataset, read_rows_or_errors
from ovis_jax.loading import LoadedOvis, load

AccuracySummary = dict[str, dict[str, float]]
"""Accuracy by kind of question, then by column: ALL, NEW_PHRASING or a language."""

ALL = "all"
NEW_PHRASING = "new phrasing"
MEAN = "mean of kinds"
BATCH_SIZE = 64
"""Rows per batch; large, so that few shapes are compiled."""


def answer_test_questions(
    ovis: LoadedOvis, test_file: Path
) -> Iterator[tuple[ScoredAnswer, Mapping[str, Any]]]:
    """Yield the answer to each row, and the row's line of the file.

    Raises:
      DataError: the file cannot be used.
    """
    lines = read_rows_or_errors(test_file)
    rows = read_dataset([test_file]).rows
    line_of = {row.name: line for row, line in zip(rows, lines, strict=True)}
    for answer in answer_rows(ovis, rows, batch_size=BATCH_SIZE):
        yield answer, line_of[answer.row.name]


def summarize_accuracy(
    answers: Sequence[tuple[ScoredAnswer, Mapping[str, Any]]], *, accept_short: bool = False
) -> AccuracySummary:
    """Compute the accuracy of each kind of question and the mean of all kinds.

    Args:
      answers: results of `answer_test_questions`.
      accept_short: accept the short form of an answer, too.
    """
    outcomes: dict[str, list[tuple[str, bool]]] = {}
    for answer, line in answers:
        metadata = line["metadata"]
        short = accept_short and answer.text.strip() == metadata["short"]
        columns = [ALL, metadata["language"], *([NEW_PHRASING] if metadata["paraphrase"] else [])]
        correct = answer.is_correct or short
        outcomes.setdefault(line["kind"], []).extend((column, correct) for column in columns)
    summary = {
        kind: {name: accuracy.fraction for name, accuracy in accuracy_by_kind(pairs).items()}
        for kind, pairs in sorted(outcomes.items())
    }
    kinds = list(summary.values())
    names = sorted({name for columns in kinds for name in columns})
    summary[MEAN] = {
        name: float(np.mean([columns[name] for columns in kinds if name in columns]))
        for name in names
    }
    return summary


def render_summary(summary: AccuracySummary) -> Table:
    """Render a summary as a table."""
    names = list(summary[MEAN])
    table = Table("kind", *(Column(name, justify="right") for name in names))
    for kind, columns in summary.items():
        if kind == MEAN:
            table.add_section()
        cells = (f"{columns[name]:.1%}" if name in columns else "" for name in names)
        table.add_row(kind, *cells)
    return table


def main() -> None:
    """Parse the command line, answer the questions, and print the accuracy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, or ovis-tiny")
    parser.add_argument("test", type=Path, metavar="TEST.jsonl", help="test questions")
    parser.add_argument("--adapters", type=Path, help="folder of LoRA adapters")
    parser.add_argument("--quantization", choices=["int8", "int4"], help="format of the matrices")
    parser.add_argument("--accept-short", action="store_true", help="also accept short answers")
    parser.add_argument("--json", type=Path, help="JSON file to write the accuracy to")
    parser.add_argument(
        "--show-wrong", type=int, default=0, help="number of wrong answers to print"
    )
    args = parser.parse_args()
    ovis = load(args.model, quantization=args.quantization, adapters=args.adapters)
    progress = track(
        answer_test_questions(ovis, args.test),
        "answering",
        len(read_rows_or_errors(args.test)),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    answers = list(progress)
    summary = summarize_accuracy(answers, accept_short=args.accept_short)
    Console().print(render_summary(summary))
    print(f"{np.mean([len(answer.token_ids) for answer, _ in answers]):.2f} tokens per answer")
    wrong = [pair for pair in answers if not pair[0].is_correct]
    for answer, line in wrong[: args.show_wrong]:
        question = line["conversations"][-2]["value"].replace("\n", " ")
        print(f"{line['id']}: {question} -> {answer.text!r}, expected {answer.expected!r}")
    if args.json:
        args.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
