"""Evaluating a model on questions: the result for each question, and a table of accuracies."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

from rich.table import Column, Table

from ovis_jax.evaluation.batch_answering import (
    Accuracy,
    EvalPrompt,
    answer_rows,
    score_answers,
)
from ovis_jax.evaluation.published_prompts_and_scores import (
    OPTION_LETTERS,
    load_published_benchmarks,
)
from ovis_jax.evaluation.questions import EvalQuestion
from ovis_jax.loading import LoadedOvis

ChooseBy = Literal["letter", "log_prob"]
"""How an option is chosen: by the generated letter (the published way) or by log-probability."""


class QuestionResult(TypedDict):
    """The result for one question, in the form that is written to a results file.

    `answer` is the model's text, or the most probable letter. `parsed` is the part of `answer` that
    is compared with `expected`, as returned by `EvalQuestion.parse_answer`.
    """

    id: str
    kind: str
    correct: bool
    answer: str
    parsed: str
    expected: str


def evaluate_questions(
    ovis: LoadedOvis,
    questions: Sequence[EvalQuestion],
    *,
    batch_size: int,
    max_new_tokens: int,
    max_partition: int,
    choose_by: ChooseBy,
    strict: bool = False,
) -> Iterator[QuestionResult]:
    """Answer questions greedily, and compare each answer with the expected answer.

    Args:
      ovis: The model.
      questions: The questions.
      batch_size: Number of questions per batch.
      max_new_tokens: Maximum number of tokens per answer.
      max_partition: Maximum number of cells that an image is split into.
      choose_by: How an option of a multiple-choice question is chosen.
      strict: Whether an answer must have the form that the prompt asks for; see
        `ovis_jax.evaluation.answer_comparison`.

    Yields:
      One result per question; the order of questions depends on their lengths.

    Raises:
      OvisError: An image cannot be read, or a question is too long.
    """
    sizes: dict[str, Any] = {"batch_size": batch_size, "max_partition": max_partition}
    by_name: dict[str, EvalQuestion] = {}
    scored: list[EvalQuestion] = []
    for question in questions:
        if question.answer_type == "multiple_choice" and choose_by == "log_prob":
            scored.append(question)
        else:
            by_name[question.row.name] = question
    rows = [question.row for question in by_name.values()]
    for answer in answer_rows(ovis, rows, max_new_tokens=max_new_tokens, **sizes):
        yield _result(by_name[answer.row.name], answer.text, strict)
    prompts = [EvalPrompt(q.prompt, q.row.images, q.row.name) for q in scored]
    letters = [list(OPTION_LETTERS[: len(question.options)]) for question in scored]
    for index, log_probs, *_ in score_answers(
        ovis, prompts, letters, add_end_of_turn=False, **sizes
    ):
        yield _result(scored[index], letters[index][int(log_probs.argmax())], strict)


def _result(question: EvalQuestion, text: str, strict: bool) -> QuestionResult:
    return {
        "id": question.id,
        "kind": question.row.kind,
        "correct": question.is_correct(text, strict=strict),
        "answer": text,
        "parsed": question.parse_answer(text, strict=strict),
        "expected": question.expected,
    }


def accuracy_table(accuracies: Mapping[str, Accuracy]) -> Table:
    """Return a table of the accuracy per kind and overall, with the published scores if known."""
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
