"""Ask a model questions, and count how often it is right."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.table import Column, Table

from ovis_jax.evaluation.published import LETTERS, published
from ovis_jax.evaluation.questions import Question
from ovis_jax.evaluation.results import Result
from ovis_jax.inference.score import score
from ovis_jax.inputs.answers import encode_answers
from ovis_jax.loading import LoadedOvis
from ovis_jax.training.evaluation import answer_rows, fill, like_length, naming, turns_length

By = Literal["letter", "score"]
"""How an option is chosen: by the letter that is answered, as published, or the likeliest one."""


@dataclass(frozen=True)
class Settings:
    """How questions are asked: greedily, and by default as for the published figures."""

    batch: int = 16
    max_new_tokens: int = published().settings["max_new_tokens"]
    max_partition: int = published().settings["max_partition"]
    by: By = "letter"


def evaluate(
    ovis: LoadedOvis, questions: Sequence[Question], settings: Settings
) -> Iterator[Result]:
    """Ask each question.

    Yields a result for each, in an order of its own: `id`, `kind`, `right`, `answer` (what the
    model said, or with `by` "score" the letter that is likeliest), `read` (what that is taken for)
    and `expected`.

    Raises:
      OvisError: an image cannot be read, or a question is too long.
    """
    by_name = {question.row.name: question for question in questions}
    scored = [q for q in questions if q.way == "choice" and settings.by == "score"]
    asked = [q.row for q in questions if q.way != "choice" or settings.by == "letter"]
    answers = answer_rows(
        *(ovis.processor, ovis.model, ovis.params, asked),
        batch=settings.batch,
        max_new_tokens=settings.max_new_tokens,
        max_partition=settings.max_partition,
    )
    for answer in answers:
        yield _result(by_name[answer.row.name], answer.text)
    for question, letter in likeliest(ovis, scored, settings):
        yield _result(question, letter)


def likeliest(
    ovis: LoadedOvis, questions: Sequence[Question], settings: Settings
) -> Iterator[tuple[Question, str]]:
    """The option of each question whose letter is likeliest to begin the answer."""
    lengths = [turns_length(question.row.images, question.prompt) for question in questions]
    for indices in like_length(lengths, settings.batch):
        chosen = [questions[i] for i in indices]
        names = [question.row.name for question in chosen]
        prompts = [question.prompt for question in chosen]
        images = [question.row.open_images() for question in chosen]
        asked, shown = fill(prompts, settings.batch), fill(images, settings.batch)
        with naming(names, ovis.processor, prompts, images, settings.max_partition):
            inputs = ovis.processor(asked, shown, max_partition=settings.max_partition)
        letters = [list(LETTERS[: len(question.choices)]) for question in chosen]
        answers = encode_answers(ovis.processor, fill(letters, settings.batch), closed=False)
        found = np.asarray(score(ovis.model, ovis.params, inputs, answers).log_probs)
        for question, log_probs in zip(chosen, found, strict=False):
            yield question, LETTERS[int(log_probs.argmax())]


def _result(question: Question, text: str) -> Result:
    return {
        "id": question.id,
        "kind": question.row.kind,
        "right": question.is_right(text),
        "answer": text,
        "read": question.read(text),
        "expected": question.expected,
    }


def accuracy(results: Iterable[Result]) -> dict[str, tuple[int, int]]:
    """How many are right of how many, by kind, in the order of the kinds' names."""
    counts: dict[str, tuple[int, int]] = {}
    for result in results:
        right, number = counts.get(result["kind"], (0, 0))
        counts[result["kind"]] = (right + bool(result["right"]), number + 1)
    return dict(sorted(counts.items()))


def table(counts: Mapping[str, tuple[int, int]]) -> Table:
    """The shares of right answers by kind and over all, published figures beside those known."""
    known = {kind: published().benchmark(kind) for kind in counts}
    models = list(published().figures) if any(known.values()) else []
    numbers = ["questions", "right", "accuracy", *(f"published: {model}" for model in models)]
    shown = Table("kind", *(Column(name, justify="right") for name in numbers))
    for kind, (right, number) in counts.items():
        name = known[kind]
        figures = [f"{published().figures[model][name]:.1f}%" if name else "" for model in models]
        shown.add_row(kind, str(number), str(right), f"{right / number:.1%}", *figures)
    right, number = (sum(column) for column in zip(*counts.values(), strict=True))
    shown.add_section()
    shown.add_row("all", str(number), str(right), f"{right / number:.1%}")
    return shown
