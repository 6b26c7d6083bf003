"""Evaluating a model on questions: the result of each question, and a table of accuracies."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
from rich.table import Column, Table

from ovis_jax.evaluation.batch_answering import (
    Accuracy,
    answer_rows,
    conversation_length,
    encode_row_prompt,
    group_by_length,
    pad_to_batch,
    repeat_last,
)
from ovis_jax.evaluation.published_prompts_and_scores import (
    OPTION_LETTERS,
    load_published_benchmarks,
)
from ovis_jax.evaluation.questions import EvalQuestion
from ovis_jax.inference.score import score
from ovis_jax.inputs.candidate_answers import encode_answers
from ovis_jax.loading import LoadedOvis

ChooseBy = Literal["letter", "log_prob"]
"""How an option is chosen: by the generated letter, as published, or by log-probability."""


@dataclass(frozen=True)
class EvalSettings:
    """Settings of an evaluation; the defaults are those of the published scores."""

    batch_size: int = 16
    max_new_tokens: int = load_published_benchmarks().settings["max_new_tokens"]
    max_partition: int = load_published_benchmarks().settings["max_partition"]
    choose_by: ChooseBy = "letter"


class QuestionResult(TypedDict):
    """The result of one question, as it is written to a results file.

    `answer` is the model's text, or the most probable letter; `parsed` is what is compared with
    `expected` (see `EvalQuestion.parse_answer`).
    """

    id: str
    kind: str
    correct: bool
    answer: str
    parsed: str
    expected: str


def evaluate_questions(
    ovis: LoadedOvis, questions: Sequence[EvalQuestion], settings: EvalSettings
) -> Iterator[QuestionResult]:
    """Answer questions greedily and compare each answer with the expected one.

    Yields:
      One result per question, grouped by length.

    Raises:
      OvisError: an image cannot be read, or a question is too long.
    """
    by_name = {question.row.name: question for question in questions}
    by_log_prob = [
        question
        for question in questions
        if question.answer_type == "multiple_choice" and settings.choose_by == "log_prob"
    ]
    scored_names = {question.row.name for question in by_log_prob}
    answers = answer_rows(
        ovis,
        [question.row for question in questions if question.row.name not in scored_names],
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        max_partition=settings.max_partition,
    )
    for answer in answers:
        yield _result(by_name[answer.row.name], answer.text)
    for question, letter in most_probable_options(ovis, by_log_prob, settings):
        yield _result(question, letter)


def most_probable_options(
    ovis: LoadedOvis, questions: Sequence[EvalQuestion], settings: EvalSettings
) -> Iterator[tuple[EvalQuestion, str]]:
    """Yield each multiple-choice question with the letter that most probably begins its answer."""
    lengths = [
        conversation_length(question.row.image_paths, question.prompt) for question in questions
    ]
    size = settings.batch_size
    for indices in group_by_length(lengths, size):
        batch = [questions[i] for i in indices]
        examples = [
            encode_row_prompt(ovis.processor, question.row, settings.max_partition)
            for question in batch
        ]
        inputs = pad_to_batch(ovis.processor, examples, size)
        letters = [list(OPTION_LETTERS[: len(question.options)]) for question in batch]
        answers = encode_answers(ovis.processor, repeat_last(letters, size), add_end_of_turn=False)
        log_probs = np.asarray(score(ovis.model, ovis.params, inputs, answers).log_probs)
        for question, option_log_probs in zip(batch, log_probs, strict=False):
            yield question, OPTION_LETTERS[int(option_log_probs.argmax())]


def _result(question: EvalQuestion, text: str) -> QuestionResult:
    return {
        "id": question.id,
        "kind": question.row.kind,
        "correct": question.is_correct(text),
        "answer": text,
        "parsed": question.parse_answer(text),
        "expected": question.expected,
    }


def accuracy_table(accuracies: Mapping[str, Accuracy]) -> Table:
    """Return a table of the accuracy per kind and overall, with published scores where known."""
    published = load_published_benchmarks()
    benchmarks = {kind: published.find_benchmark(kind) for kind in accuracies}
    models = list(published.scores) if any(benchmarks.values()) else []
    numbers = ["questions", "correct", "accuracy", *(f"published: {model}" for model in models)]
    table = Table("kind", *(Column(name, justify="right") for name in numbers))
    for kind, accuracy in accuracies.items():
        name = benchmarks[kind]
        scores = [f"{published.scores[model][name]:.1f}%" if name else "" for model in models]
        table.add_row(kind, *_cells(accuracy), *scores)
    correct, total = (sum(column) for column in zip(*accuracies.values(), strict=True))
    table.add_section()
    table.add_row("all", *_cells(Accuracy(correct, total)))
    return table


def _cells(accuracy: Accuracy) -> list[str]:
    return [str(accuracy.total), str(accuracy.correct), f"{accuracy.fraction:.1%}"]
