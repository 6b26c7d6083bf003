"""Question files with expected answers: a JSON lines or parquet file, or a folder of JSON lines.

    {"image": IMAGES, "question": TEXT, "answer": TEXT}
    {"image": IMAGES, "question": TEXT, "choices": [TEXT, ...], "answer": LETTER, NUMBER or TEXT}

IMAGES is an image or a list of images, in the forms that `ovis_jax.inputs.dataset` describes. The
key `image` may also be `images`, and `choices` may also be `options`. The optional fields are
`image`, `hint` (inserted before the question), `kind` (accuracy is reported per kind; the default
is the file's name) and `id`. A row from a training set is also accepted: its last answer is the
expected answer, and the turns before it are used as the prompt without changes. An unknown key is
an error, as in training rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ovis_jax.errors import DataError, OvisError, count_noun
from ovis_jax.evaluation.answer_comparison import (
    AnswerType,
    read_answer,
    read_answer_strictly,
)
from ovis_jax.evaluation.published_prompts_and_scores import (
    OPTION_LETTERS,
    load_published_benchmarks,
)
from ovis_jax.inputs.conversation import Turn
from ovis_jax.inputs.dataset import (
    CONVERSATION_KEYS,
    IMAGE_KEYS,
    DatasetRow,
    parse_images,
    parse_row,
    read_rows_or_errors,
    require_text,
    select_fields,
)

OPTION_KEYS = ("choices", "options")
QUESTION_KEYS = (*IMAGE_KEYS, "question", "answer", *OPTION_KEYS, "hint", "kind")


@dataclass(frozen=True)
class EvalQuestion:
    """A question with its expected answer.

    Attributes:
      id: The question's id, unique across all files.
      row: The prompt, followed by the expected answer. For a multiple-choice question, this answer
        is a letter.
      answer_type: How answers are compared in strict mode.
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

    def parse_answer(self, text: str, *, strict: bool = False) -> str:
        """Return the part of a model's text that is compared with the expected answer.

        With `strict`, `read_answer_strictly` reads the text; otherwise, `read_answer` does.
        """
        if strict:
            return read_answer_strictly(text, self.answer_type, self.options)
        return read_answer(text, self.expected, self.options)

    def is_correct(self, text: str, *, strict: bool = False) -> bool:
        """Return whether `parse_answer` reads the expected answer from a model's text."""
        expected = self.expected
        if self.answer_type != "multiple_choice":
            expected = self.parse_answer(expected, strict=strict)
        return self.parse_answer(text, strict=strict) == expected


def read_questions(
    path: Path,
    *,
    raw_prompts: bool = False,
    images: Path | None = None,
    system_turns: bool = False,
) -> list[EvalQuestion]:
    """Read a question file, or every .jsonl file in a folder.

    Args:
      path: The file or folder.
      raw_prompts: Whether to use the questions as prompts without the published prompt templates.
      images: The folder that image paths are relative to; by default, the folder of each file.
      system_turns: Whether the model's conversations have system turns.

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
        for number, value in enumerate(read_rows_or_errors(file), 1):
            name = f"{file}: row {number}"
            try:
                if isinstance(value, DataError):
                    raise value
                folder = images or file.parent
                question = _parse_question(value, name, folder, raw_prompts, system_turns)
                question_id = value.get("id")
                question = replace(
                    question,
                    id=f"{file.stem}-{number}" if question_id is None else str(question_id),
                    row=replace(question.row, kind=question.row.kind or file.stem),
                )
                if missing := question.row.find_missing_file():
                    raise DataError(f"image is {missing!r}, which is not a file")
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
    value: Any, name: str, folder: Path, raw_prompts: bool, system_turns: bool
) -> EvalQuestion:
    """Parse a row; the caller sets the id and, if it is missing, the kind."""
    keys = value.keys() if isinstance(value, Mapping) else ()
    if "question" not in keys and any(key in keys for key in CONVERSATION_KEYS):
        row = parse_row(value, name, folder, system_turns=system_turns)
        if row.turns[-1]["role"] != "assistant":
            raise DataError("the conversation does not end with an answer from gpt")
        return EvalQuestion("", row)
    fields = select_fields(value, QUESTION_KEYS)
    question = require_text(fields, "question")
    hint = require_text(fields, "hint") if fields.get("hint") else ""
    images = parse_images(fields, folder)
    options = _parse_options(fields)
    expected = _parse_expected(fields, options)
    is_yes_no = not options and expected.strip().rstrip(".").casefold() in ("yes", "no")
    answer_type = "multiple_choice" if options else "yes_no" if is_yes_no else "text"
    by_letter = dict(zip(OPTION_LETTERS, options, strict=False))
    published = load_published_benchmarks()
    prompt = published.format_prompt(question, hint, by_letter, is_yes_no=is_yes_no)
    turns = ({"role": "user", "content": question if raw_prompts else prompt},)
    turns += ({"role": "assistant", "content": expected},)
    row = DatasetRow(name, images, turns, kind=str(fields.get("kind", "")))
    return EvalQuestion("", row, answer_type, options)


def _parse_options(row: Mapping[str, Any]) -> tuple[str, ...]:
    keys = [key for key in OPTION_KEYS if row.get(key)]
    if len(keys) > 1:
        raise DataError("choices and options both have a value, expected one of them")
    if not keys:
        return ()
    key, options = keys[0], row[keys[0]]
    if isinstance(options, Mapping) and "".join(options) == OPTION_LETTERS[: len(options)]:
        options = list(options.values())
    if not isinstance(options, list) or not all(isinstance(x, str) and x.strip() for x in options):
        raise DataError(f"{key} is {options!r}, expected a list of non-empty strings")
    if not 2 <= len(options) <= len(OPTION_LETTERS):
        found = count_noun(len(options), "text")
        raise DataError(f"{key} has {found}, expected 2 to {len(OPTION_LETTERS)}")
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
