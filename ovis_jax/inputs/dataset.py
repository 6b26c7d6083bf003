"""Dataset files in the original's format: conversations about images, and preference pairs.

A file is a JSON list, or a JSON lines file, of rows in one of two forms:

    {"image": PATHS, "conversations": [{"from": "human" | "gpt", "value": TEXT}, ...]}
    {"image": PATHS, "prompt": PROMPT, "chosen": TEXT, "rejected": TEXT}

PATHS is a path or a list of paths relative to the file; `image` is optional. PROMPT is a text, or a
list of turns as in `conversations` that ends with a human turn. A row may also have a `kind`, and
accuracy is reported per kind. Images are opened only when a row is used.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ovis_jax.errors import DataError, OvisError
from ovis_jax.inputs.conversation import IMAGE_PLACEHOLDER, Turn, turns_from_sharegpt
from ovis_jax.inputs.open_image import open_image


class PreferencePair(NamedTuple):
    """The chosen and the rejected answer to a prompt."""

    chosen: str
    rejected: str


@dataclass(frozen=True)
class DatasetRow:
    """One row of a dataset file.

    Attributes:
      name: Name of the row in messages: "FILE: row N", counted from 1.
      image_paths: Paths of the images in order of appearance.
      turns: The conversation; for a preference pair, the prompt.
      preference: The two answers of a preference pair; None for a conversation.
      kind: The kind that the row's answer is counted under when accuracy is reported.
    """

    name: str
    image_paths: tuple[str, ...]
    turns: tuple[Turn, ...]
    preference: PreferencePair | None = None
    kind: str = ""

    def open_images(self) -> list[Image.Image]:
        """Decode the images.

        Raises:
          DataError: An image cannot be read.
        """
        try:
            return [open_image(path) for path in self.image_paths]
        except OvisError as error:
            raise DataError(f"{self.name}: {error}") from error

    def turns_with(self, answer: str) -> list[Turn]:
        """Return the row's turns, followed by an assistant turn with an answer."""
        return [*self.turns, {"role": "assistant", "content": answer}]


@dataclass(frozen=True)
class Dataset:
    """The valid rows in dataset files, and an error message for each invalid row."""

    rows: tuple[DatasetRow, ...]
    errors: tuple[str, ...]


def read_dataset(paths: Sequence[Path]) -> Dataset:
    """Read dataset files without opening their images.

    Raises:
      DataError: A file cannot be read, is not JSON, or has no rows.
    """
    rows: list[DatasetRow] = []
    errors: list[str] = []
    for path in paths:
        for number, value in enumerate(read_json_rows_or_errors(path), 1):
            name = f"{path}: row {number}"
            if isinstance(value, DataError):
                errors.append(f"{name}: {value}")
                continue
            try:
                rows.append(parse_row(value, name, str(path.parent)))
            except OvisError as error:
                errors.append(f"{name}: {error}")
    if not rows and not errors:
        raise DataError(f"{', '.join(map(str, paths))}: no rows")
    return Dataset(tuple(rows), tuple(errors))


def read_json_rows_or_errors(path: Path) -> list[Any]:
    """Read the rows of a JSON list or JSON lines file, without checking their fields.

    For a line that is not JSON, the result contains a `DataError` in its place.

    Raises:
      DataError: The file cannot be read, or it begins like a JSON list but is not valid JSON.
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
    # splitlines() would also split at Unicode line separators, which may occur in texts.
    return [_parse_line(line) for line in text.split("\n") if line.strip()]


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return DataError(f"not JSON: {error}")


def parse_row(value: Any, name: str, folder: str) -> DatasetRow:
    """Parse one JSON value from a dataset file.

    Args:
      value: The JSON value.
      name: Name of the row in messages.
      folder: The folder that image paths are relative to.

    Raises:
      OvisError: The value is neither a valid conversation nor a valid preference pair.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"the row has type {type(value).__name__}, expected an object")
    paths = parse_image_paths(value, folder)
    kind = str(value.get("kind", ""))
    preference = None
    if "conversations" in value:
        turns = turns_from_sharegpt(_check_turns(value["conversations"], "conversations"))
        if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
            raise DataError("no turn from gpt has an answer, so there is nothing to learn")
    elif {"prompt", "chosen", "rejected"} <= value.keys():
        prompt = value["prompt"]
        if not isinstance(prompt, list):
            prompt = [{"from": "human", "value": require_text(value, "prompt")}]
        turns = turns_from_sharegpt(_check_turns(prompt, "prompt"))
        if turns[-1]["role"] != "user":
            raise DataError("the last turn of prompt is from gpt, expected one from human")
        preference = PreferencePair(require_text(value, "chosen"), require_text(value, "rejected"))
    else:
        raise DataError(
            f"the keys are {sorted(value)}, expected conversations, or prompt, chosen and rejected"
        )
    marks = sum(turn["content"].count(IMAGE_PLACEHOLDER) for turn in turns)
    if marks not in (0, len(paths)):
        raise DataError(
            f"the texts contain {IMAGE_PLACEHOLDER} {marks} times and the row has {len(paths)}"
            " images; expected one per image, or none"
        )
    return DatasetRow(name, paths, tuple(turns), preference, kind)


def parse_image_paths(row: Mapping[str, Any], folder: str) -> tuple[str, ...]:
    """Return the paths in a row's `image` field, joined to `folder`.

    Raises:
      DataError: `image` is neither a path nor a list of paths.
    """
    images = row.get("image") or ()
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list | tuple) or not all(isinstance(x, str) for x in images):
        raise DataError(f"image is {row['image']!r}, expected a path or a list of paths")
    return tuple(os.path.join(folder, image) for image in images)


def require_text(row: Mapping[str, Any], field: str) -> str:
    """Return a required text field of a row.

    Raises:
      DataError: The field is missing, empty or not a string.
    """
    if field not in row:
        raise DataError(f"{field} is missing; the row has {', '.join(sorted(row)) or 'no fields'}")
    text = row[field]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{field} is {text!r}, expected a non-empty string")
    return text


def _check_turns(turns: Any, field: str) -> list[Turn]:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{field} is {turns!r}, expected a list of turns")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or not all(isinstance(x, str) for x in turn.values()):
            raise DataError(
                f"turn {number} of {field} is {turn!r}, expected the fields from and value, both"
                " strings"
            )
    return turns
