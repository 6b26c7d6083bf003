"""Question files with expected answers: a JSON lines file, or a folder of such files.

    {"image": PATHS, "question": TEXT, "answer": TEXT}
    {"image": PATHS, "question": TEXT, "choices": [TEXT, ...], "answer": LETTER, NUMBER or TEXT}

PATHS is a path or a list of paths relative to the file. The optional fields are `image`, `hint`
(inserted before the question), `kind` (accuracy is reported per kind; the default is the file's
name) and `id`. A row from a training set (`conversations`) is also accepted: its last answer is the
expected answer, and the turns before it are used as the prompt without changes.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ovis_jax.errors import DataError, OvisError, count_noun
from ovis_jax.evaluation.published_prompts_and_scores import (
    OPTION_LETTERS,
    load_published_benchmarks,
)
from ovis_jax.inputs.conversation import Turn
from ovis_jax.inputs.dataset import (
    DatasetRow,
    parse_image_paths,
    parse_row,
    read_json_rows_or_errors,
    require_text,
)

AnswerType = Literal["text", "yes_no", "multiple_choice"]
"""How answers are compared: as exact text, as yes or no, or as the letter of an option."""


@dataclass(frozen=True)
class EvalQuestion:
    """A question with its expected answer.

    Attributes:
      id: The question's id, unique across all files.
      row: The prompt, followed by the expected answer. For a multiple-choice question, this answer
        is a letter.
      answer_type: How answers are compared.
      options: The options of a multiple-choice question; empty for other questions.
    """

    id: str
    row: DatasetRow
    answer_type: AnswerType = "text"
    options: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """The text of the expected answer."""
        return self.row.turns[-1]["content"]

    @property
    def prompt(self) -> list[Turn]:
        """The conversation up to and including the question."""
        return list(self.row.turns[:-1])

    def parse_answer(self, text: str) -> str:
        """Extract the part of a model's text that is compared with the expected answer.

        For a multiple-choice question, the result is the option's letter, or "" if the text names
        no option. A letter counts if it is the whole text or is followed by punctuation, as in "B."
        or "(B) the dog". The full text of an option also counts. "A dog" names no option, because
        the letter is not followed by punctuation.
        """
        text = text.strip()
        if self.answer_type == "yes_no":
            return text.rstrip(".").casefold()
        if self.answer_type == "multiple_choice":
            letters = OPTION_LETTERS[: len(self.options)]
            if match := re.match(rf"\(?([{letters}])([).:,]|$)", text):
                return match[1]
            options = [option.strip().rstrip(".").casefold() for option in self.options]
            answer = text.rstrip(".").casefold()
            return letters[options.index(answer)] if answer in options else ""
        return text

    def is_correct(self, text: str) -> bool:
        """Return whether `parse_answer` extracts the expected answer from a model's text."""
        expected = self.expected
        if self.answer_type != "multiple_choice":
            expected = self.parse_answer(expected)
        return self.parse_answer(text) == expected


def read_questions(path: Path, *, raw_prompts: bool = False) -> list[EvalQuestion]:
    """Read a question file, or every .jsonl file in a folder.

    Args:
      path: The file or folder.
      raw_prompts: Whether to use the questions as prompts without the published prompt templates.

    Raises:
      DataError: There are no questions, or a row is invalid. The error names the file, row and
        field of the first invalid row.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: the folder has no file whose name ends with .jsonl")
    questions: list[EvalQuestion] = []
    errors: list[str] = []
    row_of_id: dict[str, str] = {}
    for file in files:
        for number, value in enumerate(read_json_rows_or_errors(file), 1):
            name = f"{file}: row {number}"
            try:
                question = _parse_question(value, name, file, number, raw_prompts)
                if question.id in row_of_id:
                    raise DataError(f"id is {question.id!r}, as in {row_of_id[question.id]}")
            except OvisError as error:
                errors.append(f"{name}: {error}")
                continue
            row_of_id[question.id] = name
            questions.append(question)
    if errors:
        more = len(errors) - 1
        rest = f" (and {count_noun(more, 'more invalid row')})" if more else ""
        raise DataError(errors[0] + rest)
    if not questions:
        raise DataError(f"{path}: no questions")
    return questions


def _parse_question(
    value: Any, name: str, file: Path, number: int, raw_prompts: bool
) -> EvalQuestion:
    if isinstance(value, DataError):
        raise value
    if not isinstance(value, Mapping):
        raise DataError(f"the row has type {type(value).__name__}, expected an object")
    question_id = str(value.get("id", f"{file.stem}-{number}"))
    kind = str(value.get("kind") or file.stem)
    if "conversations" in value:
        row = parse_row(value, name, str(file.parent))
        if row.turns[-1]["role"] != "assistant":
            raise DataError("conversations does not end with an answer from gpt")
        _check_files_exist(row.image_paths)
        return EvalQuestion(question_id, replace(row, kind=kind))
    question = require_text(value, "question")
    hint = "" if value.get("hint") is None else require_text(value, "hint")
    paths = parse_image_paths(value, str(file.parent))
    _check_files_exist(paths)
    options = _parse_options(value)
    expected = _parse_expected(value, options)
    is_yes_no = not options and expected.strip().rstrip(".").casefold() in ("yes", "no")
    answer_type = "multiple_choice" if options else "yes_no" if is_yes_no else "text"
    by_letter = dict(zip(OPTION_LETTERS, options, strict=False))
    published = load_published_benchmarks()
    prompt = published.format_prompt(question, hint, by_letter, is_yes_no=is_yes_no)
    turns = ({"role": "user", "content": question if raw_prompts else prompt},)
    turns += ({"role": "assistant", "content": expected},)
    return EvalQuestion(
        question_id, DatasetRow(name, paths, turns, kind=kind), answer_type, options
    )


def _parse_options(row: Mapping[str, Any]) -> tuple[str, ...]:
    options = row.get("choices")
    if options is None:
        return ()
    if not isinstance(options, list) or not all(isinstance(x, str) and x.strip() for x in options):
        raise DataError(f"choices is {options!r}, expected a list of non-empty strings")
    if not 2 <= len(options) <= len(OPTION_LETTERS):
        found = count_noun(len(options), "text")
        raise DataError(f"choices has {found}, expected 2 to {len(OPTION_LETTERS)}")
    return tuple(options)


def _parse_expected(row: Mapping[str, Any], options: Sequence[str]) -> str:
    """Return the expected answer; for a multiple-choice question, the letter of the option."""
    answer = row.get("answer")
    letters = OPTION_LETTERS[: len(options)]
    if not options or (isinstance(answer, str) and len(answer) == 1 and answer in letters):
        return require_text(row, "answer")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return letters[answer]
    if isinstance(answer, str) and list(options).count(answer) == 1:
        return letters[options.index(answer)]
    raise DataError(
        f"answer is {answer!r}, expected a letter from {letters[0]} to {letters[-1]}, the number"
        " of a choice counted from 0, or the text of a choice"
    )


def _check_files_exist(paths: Sequence[str]) -> None:
    for path in paths:
        if not os.path.isfile(path):
            raise DataError(f"image is {path!r}, which is not a file")
