"""Files of questions with their answers: JSON lines, or a folder of such files.

    {"image": PATHS, "question": TEXT, "answer": TEXT}
    {"image": PATHS, "question": TEXT, "choices": [TEXT, ...], "answer": LETTER, NUMBER or TEXT}

PATHS is a path or a list of them, relative to the file; `image` may be left out. `hint` stands
before a question, `kind` names the group that it is counted in (else the file's name), and `id` it
itself. A row of a training set (`conversations`) is a question too: its last answer is the expected
one, and it is asked as it stands.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ovis_jax.errors import DataError, OvisError
from ovis_jax.evaluation.published import LETTERS, published
from ovis_jax.inputs.conversation import Turn
from ovis_jax.training.rows import Row, read_images, read_row, read_values

Way = Literal["exact", "yes_no", "choice"]
"""How an answer is compared: as it is; as yes or no; or as the letter of an option."""

YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
      id: its name, once in all files.
      row: what is asked, and as the last turn what is expected; for options, the letter.
      way: how the answer is compared.
      choices: the options.
    """

    id: str
    row: Row
    way: Way = "exact"
    choices: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """The right answer."""
        return self.row.turns[-1]["content"]

    @property
    def prompt(self) -> list[Turn]:
        """What is asked."""
        return list(self.row.turns[:-1])

    def read(self, text: str) -> str:
        """What a model's text says: for options the letter that it names, or "" if it names none.

        A letter counts alone, or in front of a mark, as in "B." or "(B) the dog"; so does the whole
        text of an option. "A dog" names no letter.
        """
        text = text.strip()
        if self.way == "yes_no":
            return text.rstrip(".").casefold()
        if self.way == "choice":
            letters = LETTERS[: len(self.choices)]
            if found := re.match(rf"\(?([{letters}])([).:,]|$)", text):
                return found[1]
            plain = [choice.strip().rstrip(".").casefold() for choice in self.choices]
            said = text.rstrip(".").casefold()
            return letters[plain.index(said)] if said in plain else ""
        return text

    def is_right(self, text: str) -> bool:
        """Whether a model's text is the right answer."""
        expected = self.expected if self.way == "choice" else self.read(self.expected)
        return self.read(text) == expected


def read_questions(path: Path, *, plain: bool = False) -> list[Question]:
    """Read a file of questions, or every file of a folder whose name ends with .jsonl.

    Args:
      path: the file or folder.
      plain: ask as the files say, without what the published prompts add.

    Raises:
      DataError: there is none, or rows are not as they should be: names the file, row and field of
        the first.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: the folder holds no file whose name ends with .jsonl")
    found: list[Question] = []
    faults: list[str] = []
    rows_of: dict[str, str] = {}
    for file in files:
        for number, value in enumerate(read_values(file), 1):
            name = f"{file}: row {number}"
            try:
                question = _question(value, name, file, number, plain)
                if question.id in rows_of:
                    raise DataError(f"id is {question.id!r}, as in {rows_of[question.id]}")
            except OvisError as error:
                faults.append(f"{name}: {error}")
                continue
            rows_of[question.id] = name
            found.append(question)
    if faults:
        more = f" (and {len(faults) - 1} rows more)" if len(faults) > 1 else ""
        raise DataError(faults[0] + more)
    if not found:
        raise DataError(f"{path}: no questions")
    return found


def _question(value: Any, name: str, file: Path, number: int, plain: bool) -> Question:
    if isinstance(value, DataError):
        raise value
    if not isinstance(value, Mapping):
        raise DataError(f"a {type(value).__name__}, expected an object")
    given = str(value.get("id", f"{file.stem}-{number}"))
    kind = str(value.get("kind") or file.stem)
    if "conversations" in value:
        row = read_row(value, name, str(file.parent))
        if row.turns[-1]["role"] != "assistant":
            raise DataError("conversations does not end with an answer from gpt")
        _check_images(row.images)
        return Question(given, replace(row, kind=kind))
    asked, hint = _text(value, "question"), _text(value, "hint", "")
    images = read_images(value, str(file.parent))
    _check_images(images)
    choices = _choices(value)
    answer = _answer(value, choices)
    way: Way = "exact"
    prompt = published().ask_open(asked, hint)
    if choices:
        options = dict(zip(LETTERS, choices, strict=False))
        way, prompt = "choice", published().ask_choice(asked, options, hint)
    elif answer.strip().rstrip(".").casefold() in YES_NO:
        way, prompt = "yes_no", published().ask_yes_no(asked, hint)
    turns = ({"role": "user", "content": asked if plain else prompt},)
    turns += ({"role": "assistant", "content": answer},)
    return Question(given, Row(name, images, turns, kind=kind), way, choices)


def _text(value: Mapping[str, Any], field: str, default: str | None = None) -> str:
    if default is not None and value.get(field) is None:
        return default
    if field not in value:
        raise DataError(f"{field} is missing; the row has {', '.join(sorted(value)) or 'nothing'}")
    if not isinstance(value[field], str) or not value[field].strip():
        raise DataError(f"{field} is {value[field]!r}, expected a text")
    return value[field]


def _choices(value: Mapping[str, Any]) -> tuple[str, ...]:
    choices = value.get("choices")
    if choices is None:
        return ()
    if not isinstance(choices, list) or not all(isinstance(x, str) and x.strip() for x in choices):
        raise DataError(f"choices is {choices!r}, expected a list of texts")
    if not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"choices has {len(choices)} entries, expected 2 to {len(LETTERS)}")
    return tuple(choices)


def _answer(value: Mapping[str, Any], choices: Sequence[str]) -> str:
    """The expected answer; of options, the letter."""
    answer = value.get("answer")
    letters = LETTERS[: len(choices)]
    if not choices or (isinstance(answer, str) and len(answer) == 1 and answer in letters):
        return _text(value, "answer")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return letters[answer]
    if isinstance(answer, str) and list(choices).count(answer) == 1:
        return letters[choices.index(answer)]
    raise DataError(
        f"answer is {answer!r}, expected a letter from {letters[0]} to {letters[-1]}, the number "
        "of a choice from 0, or a choice"
    )


def _check_images(paths: Sequence[str]) -> None:
    for path in paths:
        if not os.path.isfile(path):
            raise DataError(f"image is {path!r}, which is no file")
