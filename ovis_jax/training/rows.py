"""Dataset files in the original's format: conversations about images, and preference pairs.

A file is a JSON list, or JSON lines, of

    {"image": PATHS, "conversations": [{"from": "human" | "gpt", "value": TEXT}, ...]}
    {"image": PATHS, "prompt": PROMPT, "chosen": TEXT, "rejected": TEXT}

PATHS is a path or a list of them, relative to the file; `image` may be left out. PROMPT is a text,
or turns as in conversations of which the last is the human's. `kind` names the group that a row is
counted in when answers are scored. Images are opened by who uses a row.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ovis_jax.errors import DataError, OvisError
from ovis_jax.inputs.conversation import IMAGE_TEXT, Turn, from_original
from ovis_jax.inputs.image import open_image

Preference = tuple[str, str]
"""The answer that is preferred, and one that is not."""


@dataclass(frozen=True)
class Row:
    """One row of a dataset file.

    Attributes:
      name: the file and the row's number in it, counted from 1, for messages.
      images: paths, in order of appearance.
      turns: the conversation; of a preference pair, up to the prompt.
      answers: of a preference pair, the two answers to the prompt.
      kind: the group that the row's answer is counted in.
    """

    name: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    answers: Preference | None = None
    kind: str = ""

    def open_images(self) -> list[Image.Image]:
        """Decode the images.

        Raises:
          DataError: one cannot be read.
        """
        try:
            return [open_image(path) for path in self.images]
        except OvisError as error:
            raise DataError(f"{self.name}: {error}") from error

    def conversation(self, answer: str) -> list[Turn]:
        """The turns with one more answer."""
        return [*self.turns, {"role": "assistant", "content": answer}]


@dataclass(frozen=True)
class Rows:
    """The good rows of dataset files, and a message for each of the others."""

    rows: tuple[Row, ...]
    faults: tuple[str, ...]


def read_rows(paths: Sequence[Path]) -> Rows:
    """Read dataset files.

    Raises:
      DataError: a file cannot be read, is not JSON, or holds no rows.
    """
    rows: list[Row] = []
    faults: list[str] = []
    for path in paths:
        for number, value in enumerate(read_values(path), 1):
            name = f"{path}: row {number}"
            if isinstance(value, DataError):
                faults.append(f"{name}: {value}")
                continue
            try:
                rows.append(read_row(value, name, str(path.parent)))
            except OvisError as error:
                faults.append(f"{name}: {error}")
    if not rows and not faults:
        raise DataError(f"{', '.join(map(str, paths))}: no rows")
    return Rows(tuple(rows), tuple(faults))


def read_values(path: Path) -> list[Any]:
    """The JSON values of a file; a line that is not JSON is its error.

    Raises:
      DataError: the file cannot be read, or is one list that is not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not a JSON list: {error}") from error
    # Not at what else ends a line of Unicode, which texts may hold.
    return [_line(line) for line in text.split("\n") if line.strip()]


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return DataError(f"not JSON: {error}")


def read_row(value: Any, name: str, folder: str) -> Row:
    """Read one value of a file as a row, with what messages call it and where its paths begin.

    Raises:
      OvisError: it is not a row of one of the two forms.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"a {type(value).__name__}, expected an object")
    images = read_images(value, folder)
    kind = str(value.get("kind", ""))
    answers = None
    if "conversations" in value:
        turns = from_original(_turns(value["conversations"], "conversations"))
        if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
            raise DataError("no turn from gpt holds an answer, so there is nothing to learn")
    elif {"prompt", "chosen", "rejected"} <= value.keys():
        prompt = value["prompt"]
        if not isinstance(prompt, list):
            prompt = [{"from": "human", "value": _text(value, "prompt")}]
        turns = from_original(_turns(prompt, "prompt"))
        if turns[-1]["role"] != "user":
            raise DataError("the last turn of prompt is from gpt, expected one from human")
        answers = (_text(value, "chosen"), _text(value, "rejected"))
    else:
        raise DataError(
            f"the keys are {sorted(value)}, expected conversations, or prompt, chosen and rejected"
        )
    marks = sum(turn["content"].count(IMAGE_TEXT) for turn in turns)
    if marks not in (0, len(images)):
        raise DataError(f"{marks} times {IMAGE_TEXT} and {len(images)} images, expected as many")
    return Row(name, images, tuple(turns), answers, kind)


def read_images(value: Mapping[str, Any], folder: str) -> tuple[str, ...]:
    """The paths of a row's images.

    Raises:
      DataError: `image` is neither a path nor a list of paths.
    """
    images = value.get("image") or ()
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list | tuple) or not all(isinstance(x, str) for x in images):
        raise DataError(f"image is {value['image']!r}, expected a path or a list of paths")
    return tuple(os.path.join(folder, image) for image in images)


def _text(value: Mapping[str, Any], field: str) -> str:
    if not isinstance(value[field], str) or not value[field].strip():
        raise DataError(f"{field} is {value[field]!r}, expected a text")
    return value[field]


def _turns(turns: Any, field: str) -> list[Turn]:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{field} is {turns!r}, expected a list of turns")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or not all(isinstance(x, str) for x in turn.values()):
            raise DataError(
                f"turn {number} of {field} is {turn!r}, expected from and value, both texts"
            )
    return turns
