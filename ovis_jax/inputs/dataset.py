"""Dataset rows in the usual formats: conversations about images, and preference pairs.

A file is a JSON list, a JSON lines file or a parquet file of rows in one of two forms:

    {"image": IMAGES, "conversations": TURNS}
    {"image": IMAGES, "prompt": PROMPT, "chosen": ANSWER, "rejected": ANSWER}

- IMAGES is an image or a list of images. The key may also be `images`, and may be missing. An image
  is a path, a `data:` or `file:` URL, `{"path": PATH}` or, in a parquet file, the bytes of an image
  file, as binary or as `{"bytes": BYTES, "path": NAME}`. Images are opened only when a row is used.
- TURNS is a list of turns, either `{"from": "human" | "gpt", "value": TEXT}` (ShareGPT, LLaVA and
  Ovis) or `{"role": "user" | "assistant", "content": CONTENT}` (OpenAI); the key may also be
  `messages`. CONTENT is a text or a list of OpenAI's parts, whose images are paths or data: URLs.
  An image's `detail` has no effect. If a turn has only one text, the images come before the text,
  as in the server.
- The text of a system turn, or of the key `system`, is prepended to the text of the next user turn,
  as in the server, because Gemma2 has no system turn. For Llama, it stays a system turn.
- An assistant turn whose `loss`, `train` or `weight` is false or 0 does not contribute to the loss.
- PROMPT is a text, or turns that end with a user turn; the key may also be `conversations` or
  `messages`. ANSWER is a text or one assistant turn.
- The key `kind` is optional; accuracy is reported per kind.

`METADATA_KEYS` are ignored in rows and turns, and so are unknown keys with an empty value. Any
other unknown key is an error.
"""

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ovis_jax.errors import DataError, OvisError
from ovis_jax.inputs.conversation import IMAGE_PLACEHOLDER, Turn
from ovis_jax.inputs.image_processing import ImageSize
from ovis_jax.inputs.open_image import is_data_url, open_image, read_image_size
from ovis_jax.inputs.parquet_rows import ParquetImage, is_parquet, read_parquet_rows
from ovis_jax.user_files import GIT_LFS_POINTER, is_git_lfs_pointer, read_text

METADATA_KEYS = (
    "id question_id sample_id prompt_id uuid idx index name source data_source dataset subset"
    " category split language license model metadata width height score_chosen score_rejected"
    " __index_level_0__ __key__ __url__"
).split()
"""Keys that describe a row or a turn without affecting training; they are ignored."""

CONVERSATION_KEYS = ("conversations", "messages", "prompt")
IMAGE_KEYS = ("image", "images")
ROW_KEYS = (*IMAGE_KEYS, *CONVERSATION_KEYS, "chosen", "rejected", "system", "kind")
PART_KEYS = ("type", "text", "image", "image_url", "path", "url", "index")
LOSS_KEYS = ("loss", "train", "weight")
"""Keys with which data formats exclude a turn from the loss."""

TURN_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
"""The roles of turns, by the names that data formats use for them."""

RowImage = str | ParquetImage
"""An image of a row: a path, a `data:` or `file:` URL, or a place in a parquet file."""


class _NextImage(NamedTuple):
    """Stands for the next of the row's `images`, or for the one at `index` if it is given."""

    index: Any = None


_Place = RowImage | _NextImage


class PreferencePair(NamedTuple):
    """The chosen and the rejected answer to a prompt."""

    chosen: str
    rejected: str


@dataclass(frozen=True)
class DatasetRow:
    """One row of a dataset file.

    Attributes:
      name: Name of the row in messages: "FILE: row N", counted from 1.
      images: The images in order of appearance.
      turns: The conversation; for a preference pair, the prompt. An assistant turn that does not
        contribute to the loss has `loss` False.
      preference: The two answers of a preference pair; None for a conversation.
      kind: The kind of question under which the row's answer is counted when accuracy is reported.
    """

    name: str
    images: tuple[RowImage, ...]
    turns: tuple[Turn, ...]
    preference: PreferencePair | None = None
    kind: str = ""

    def open_images(self, *, exact: bool = False) -> list[Image.Image]:
        """Decode the images.

        Args:
          exact: Whether to read image files exactly as the original does; see `open_image`.

        Raises:
          DataError: An image cannot be read.
        """
        try:
            return [
                open_image(read_image_source(image), f"image {number}", exact=exact)
                for number, image in enumerate(self.images, 1)
            ]
        except OvisError as error:
            raise DataError(f"{self.name}: {error}") from error

    def image_sizes(self, *, exact: bool = False) -> list[ImageSize]:
        """Return the sizes of the images that `open_images` returns, mostly without decoding them.

        Raises:
          DataError: An image cannot be read.
        """
        try:
            return [
                read_image_size(read_image_source(image), f"image {number}", exact=exact)
                for number, image in enumerate(self.images, 1)
            ]
        except OvisError as error:
            raise DataError(f"{self.name}: {error}") from error

    def find_missing_file(self) -> str | None:
        """Return the path of the first image that is not a file, or None."""
        paths = (x for x in self.images if isinstance(x, str) and not _is_url(x))
        return next((path for path in paths if not os.path.isfile(path)), None)

    def turns_with(self, answer: str) -> list[Turn]:
        """Return the row's turns, followed by an assistant turn with an answer."""
        return [*self.turns, {"role": "assistant", "content": answer}]


@dataclass(frozen=True)
class Dataset:
    """The valid rows in dataset files, and an error message for each invalid row.

    Attributes:
      rows: The valid rows.
      errors: The error messages of the invalid rows.
      sources: For each valid row, the index of its file.
    """

    rows: tuple[DatasetRow, ...]
    errors: tuple[str, ...]
    sources: tuple[int, ...]


def read_dataset(
    paths: Sequence[Path], images: Path | None = None, *, system_turns: bool = False
) -> Dataset:
    """Read dataset files without opening their images.

    Args:
      paths: The files.
      images: The folder that image paths are relative to; by default, the folder of each file.
      system_turns: Whether the model's conversations have system turns.

    Raises:
      DataError: A file cannot be read, is neither JSON nor parquet, or has no rows.
    """
    rows: list[DatasetRow] = []
    errors: list[str] = []
    sources: list[int] = []
    for source, path in enumerate(paths):
        for number, value in enumerate(read_rows_or_errors(path), 1):
            name = f"{path}: row {number}"
            if isinstance(value, DataError):
                errors.append(f"{name}: {value}")
                continue
            try:
                folder = images or path.parent
                rows.append(parse_row(value, name, folder, system_turns=system_turns))
                sources.append(source)
            except OvisError as error:
                errors.append(f"{name}: {error}")
    if not rows and not errors:
        raise DataError(f"{', '.join(map(str, paths))}: no rows")
    return Dataset(tuple(rows), tuple(errors), tuple(sources))


def read_rows_or_errors(path: Path) -> list[Any]:
    """Read the rows of a JSON list, JSON lines or parquet file, without checking their fields.

    For a line that is not JSON, the result contains a `DataError` in its place. In the row of a
    parquet file, images that are stored as bytes are `ParquetImage`s.

    Raises:
      DataError: The file cannot be read, it is a pointer of Git LFS, or it begins like a JSON list
        but is not valid JSON.
      OvisError: The file is a parquet file, and pyarrow is not installed.
    """
    try:
        if is_parquet(path):
            return read_parquet_rows(path, IMAGE_KEYS)
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if is_git_lfs_pointer(path):
        raise DataError(f"{path} is {GIT_LFS_POINTER}")
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


def parse_row(value: Any, name: str, folder: Path, *, system_turns: bool = False) -> DatasetRow:
    """Parse one row of a dataset file.

    Args:
      value: The row, as `read_rows_or_errors` returns it.
      name: Name of the row in messages.
      folder: The folder that image paths are relative to.
      system_turns: Whether the model's conversations have system turns. Otherwise, their texts are
        prepended to user turns.

    Raises:
      OvisError: The row is neither a valid conversation nor a valid preference pair.
    """
    row = select_fields(value, ROW_KEYS)
    images = parse_images(row, folder)
    keys = [key for key in CONVERSATION_KEYS if key in row]
    is_pair = "chosen" in row or "rejected" in row
    if len(keys) != 1 or (keys == ["prompt"] and not is_pair):
        raise DataError(
            f"the keys are {sorted(row)}, expected either conversations or messages, or prompt,"
            " chosen and rejected"
        )
    field, turns, preference = keys[0], row[keys[0]], None
    if field == "prompt" and not isinstance(turns, list):
        turns = [{"role": "user", "content": require_text(row, "prompt")}]
    system = require_text(row, "system") if row.get("system") else ""
    turns, images = _parse_turns(turns, field, system, images, folder, system_turns)
    if is_pair:
        if turns[-1]["role"] != "user":
            raise DataError(f"the last turn of {field} is from gpt, expected one from human")
        preference = PreferencePair(_parse_answer(row, "chosen"), _parse_answer(row, "rejected"))
    elif not any(_is_learned(turn) for turn in turns):
        raise DataError("no turn from gpt has an answer, so there is nothing to learn")
    return DatasetRow(name, images, tuple(turns), preference, str(row.get("kind", "")))


def select_fields(value: Any, known: Collection[str], where: str = "") -> dict[str, Any]:
    """Return the fields of a row, a turn or a content part, without metadata and null values.

    Args:
      value: The object.
      known: The keys that the object may have, in addition to `METADATA_KEYS`.
      where: Prefix of error messages.

    Raises:
      DataError: The value is not an object, or an unknown key has a value that is not empty.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{where or 'the row '}has type {type(value).__name__}, expected an object")
    fields = {key: field for key, field in value.items() if field is not None and key in known}
    for key, field in value.items():
        if key not in known and key not in METADATA_KEYS and field not in (None, "", [], {}):
            raise DataError(
                f"{where}the key {key!r} is unknown, expected {', '.join(known)}; rename or remove"
                f" it, or move it into metadata (ignored keys: {', '.join(METADATA_KEYS)})"
            )
    return fields


def parse_images(row: Mapping[str, Any], folder: Path) -> tuple[RowImage, ...]:
    """Return the images in a row's `image` or `images` field; paths are joined to `folder`.

    Raises:
      DataError: Both fields have images, or a value is not an image.
    """
    keys = [key for key in IMAGE_KEYS if row.get(key)]
    if len(keys) > 1:
        raise DataError("image and images both have a value, expected one of them")
    if not keys:
        return ()
    (key,) = keys
    images = row[key]
    if not isinstance(images, list):
        return (_parse_image(images, folder, key),)
    return tuple(_parse_image(x, folder, f"{key}[{index}]") for index, x in enumerate(images))


def _parse_image(image: Any, folder: Path, name: str) -> RowImage:
    if isinstance(image, ParquetImage):
        return image._replace(folder=str(folder))
    if isinstance(image, Mapping) and image.keys() <= {"path", "bytes"} and not image.get("bytes"):
        image = image.get("path")
    if not isinstance(image, str) or not image:
        raise DataError(f"{name} is {image!r:.100}, expected a path or a data: URL")
    if image.startswith(("http://", "https://")):
        raise DataError(
            f"{name} is {image!r:.100}; images are not downloaded here, so save it and give its"
            " path"
        )
    return image if _is_url(image) else os.path.join(folder, image)


def _is_url(image: str) -> bool:
    return is_data_url(image) or image[:6].lower() == "file:/"


def read_image_source(image: Any) -> Any:
    """Return an image in a form that `open_image` accepts.

    Raises:
      DataError: A parquet file cannot be read.
    """
    return image.read() if isinstance(image, ParquetImage) else image


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


def _parse_answer(row: Mapping[str, Any], field: str) -> str:
    """Return one answer of a preference pair, which is a text or one assistant turn."""
    value = row.get(field)
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list):
        return require_text(row, field)
    parsed = [_parse_turn(turn, f"{field}: ", Path())[0] for turn in turns]
    if [turn["role"] for turn in parsed] != ["assistant"]:
        raise DataError(f"{field} is {value!r:.200}, expected a text or one turn of the assistant")
    return require_text({field: parsed[0]["content"]}, field)


def _parse_turns(
    value: Any,
    field: str,
    system: str,
    images: tuple[RowImage, ...],
    folder: Path,
    system_turns: bool,
) -> tuple[list[Turn], tuple[RowImage, ...]]:
    """Return the turns with "<image>" marks, and all images in order of appearance."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{field} is {value!r:.200}, expected a list of turns")
    parsed = [
        _parse_turn(turn, f"turn {number} of {field}: ", folder)
        for number, turn in enumerate(value, 1)
    ]
    places = [place for _, found in parsed for place in found]
    marks = "" if places else f"{IMAGE_PLACEHOLDER}\n" * len(images)
    turns: list[Turn] = []
    systems = [system] if system else []
    if system_turns and system:
        turns.append({"role": "system", "content": system})
        systems = []
    for turn, _ in parsed:
        if turn["role"] == "system" and not system_turns:
            systems.append(turn["content"].strip())
            continue
        if turn["role"] == "user":
            before, text = _split_leading_images(marks + turn["content"])
            turn = {**turn, "content": before + "\n\n".join([*systems, text])}
            systems, marks = [], ""
        turns.append(turn)
    if systems or marks or not turns:
        raise DataError(f"{field} has no turn from human that follows the system prompt or image")
    if not places:
        return turns, images
    following = [place for place in places if isinstance(place, _NextImage)]
    if len(following) != len(images):
        raise DataError(
            f"the texts contain {IMAGE_PLACEHOLDER} {len(following)} times and the row has"
            f" {len(images)} images; expected one per image, or none"
        )
    for number, place in enumerate(following):
        if place.index not in (None, number):
            raise DataError(
                f"a part of {field} has the index {place.index!r}, expected {number}: the parts"
                " take the row's images in order"
            )
    remaining = iter(images)
    return turns, tuple(next(remaining) if isinstance(x, _NextImage) else x for x in places)


def _split_leading_images(text: str) -> tuple[str, str]:
    """Split a text after the "<image>" marks that it begins with."""
    rest = re.sub(rf"^(?:\s*{IMAGE_PLACEHOLDER}\n?)*", "", text)
    return text[: len(text) - len(rest)], rest


def _parse_turn(turn: Any, where: str, folder: Path) -> tuple[Turn, list[_Place]]:
    """Return a turn with "<image>" marks, and its images."""
    fields = select_fields(turn, ("from", "value", "role", "content", *LOSS_KEYS), where)
    keys = [key for key in fields if key not in LOSS_KEYS]
    if set(keys) not in ({"from", "value"}, {"role", "content"}):
        raise DataError(
            f"{where}the keys are {sorted(keys)}, expected from and value, or role and content,"
            " each with a value"
        )
    role = fields.get("role", fields.get("from"))
    if not isinstance(role, str) or role not in TURN_ROLES:
        raise DataError(f"{where}the role is {role!r}, expected one of {', '.join(TURN_ROLES)}")
    role = TURN_ROLES[role]
    text, images = _parse_content(fields.get("content", fields.get("value")), where, folder)
    if images and role == "system":
        raise DataError(f"{where}a system turn has an image, expected only text")
    parsed: dict[str, Any] = {"role": role, "content": text}
    for key in LOSS_KEYS:
        if fields.get(key, 0) not in (0, 1):
            raise DataError(f"{where}{key} is {fields[key]!r}, expected false or true, or 0 or 1")
        if fields.get(key) and role != "assistant":
            raise DataError(
                f"{where}{key} is {fields[key]!r}, but only turns of the assistant contribute to"
                " the loss; remove it"
            )
        if role == "assistant" and not fields.get(key, True):
            parsed["loss"] = False
    return parsed, images


def _parse_content(content: Any, where: str, folder: Path) -> tuple[str, list[_Place]]:
    """Return the text of a turn with "<image>" marks, and its images."""
    if isinstance(content, str):
        return content, [_NextImage()] * content.count(IMAGE_PLACEHOLDER)
    if not isinstance(content, list):
        raise DataError(f"{where}the content is {content!r}, expected a text or a list of parts")
    parts: list[tuple[str, list[_Place]]] = []
    for number, value in enumerate(content, 1):
        name = f"{where}part {number}: "
        part = select_fields(value, PART_KEYS, name)
        index = part.pop("index", None)
        match part:
            case {"type": "text", "text": str(text), **rest} if not any(rest.values()):
                parts.append((text, [_NextImage()] * text.count(IMAGE_PLACEHOLDER)))
            case {"type": "image", **rest} if not any(rest.values()):
                parts.append((IMAGE_PLACEHOLDER, [_NextImage(index)]))
            case (
                {"type": "image_url", "image_url": {"url": image} | str(image), **rest}
                | {"type": "image", "image": image, **rest}
                | {"type": "image", "path": image, **rest}
                | {"type": "image", "url": image, **rest}
            ) if not any(rest.values()):
                source = _parse_image(image, folder, f"{name}the image")
                parts.append((IMAGE_PLACEHOLDER, [source]))
            case _:
                raise DataError(f"{name}found {part!r:.200}, expected one text or one image")
    texts = [text for text, _ in parts if text.strip() and text != IMAGE_PLACEHOLDER]
    if len(texts) == 1:
        parts.sort(key=lambda part: part[0] != IMAGE_PLACEHOLDER)
    return "\n".join(text for text, _ in parts), [image for _, found in parts for image in found]


def _is_learned(turn: Turn) -> bool:
    return turn["role"] == "assistant" and turn.get("loss", True) and bool(turn["content"].strip())
