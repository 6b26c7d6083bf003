"""Files of requests: OpenAI's batch format, plain rows, or a folder of pictures.

    {"custom_id": TEXT, "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    {"image": IMAGES, "prompt": TEXT}

The first line that is a JSON object determines which of the two formats a file has. Files may be
larger than memory, because only one line is read at a time.
"""

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ovis_jax.errors import DataError, RequestError
from ovis_jax.user_files import GIT_LFS_POINTER, is_git_lfs_pointer

RequestsFormat = Literal["openai", "plain"]
"""The format of the rows. A folder of pictures has the format "plain"."""

OPENAI_KEYS = {"custom_id", "body"}
"""The keys by which a row of OpenAI's batch format is recognized."""

PICTURE_SUFFIXES = set(".avif .bmp .gif .heic .heif .jpeg .jpg .png .tif .tiff .webp".split())
"""The lower-case suffixes that identify the pictures in a folder."""


class BatchRow(NamedTuple):
    """One row of a file of requests.

    Attributes:
      name: Name of the row in messages, such as "line 3".
      value: The row, which may be any JSON value, or the reason why it cannot be read.
    """

    name: str
    value: Any

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the row.

        Raises:
          DataError: The row is not a JSON object.
        """
        if isinstance(self.value, DataError):
            raise self.value
        if not isinstance(self.value, dict):
            raise DataError(f"the row has type {type(self.value).__name__}, expected an object")
        return self.value


@dataclass(frozen=True)
class RequestsFile:
    """A file of requests, or a folder of pictures.

    Attributes:
      path: The file or the folder.
      format: The format of the rows.
      num_rows: Number of rows to answer. Empty lines are not rows.
      fingerprint: Hash of the file's content, or of the names of the folder's pictures.
      pictures: The pictures of the folder, relative to it; None for a file.
      first_row: Index of the first row to answer.
    """

    path: Path
    format: RequestsFormat
    num_rows: int
    fingerprint: str
    pictures: tuple[str, ...] | None = None
    first_row: int = 0

    def share(self, process_id: int, num_processes: int) -> "RequestsFile":
        """Return the same file with one of `num_processes` shares of its rows, in their order.

        Raises:
          RequestError: The index is not that of a process.
        """
        if not 0 <= process_id < num_processes:
            raise RequestError(
                f"--process-id is {process_id}, expected 0 to {num_processes - 1} for"
                f" --num-processes {num_processes}"
            )
        first, end = (n * self.num_rows // num_processes for n in (process_id, process_id + 1))
        return replace(self, first_row=first, num_rows=end - first)

    @property
    def folder(self) -> Path:
        """The folder that image paths are relative to."""
        return self.path.parent if self.pictures is None else self.path

    def rows(self, start: int = 0) -> Iterator[BatchRow]:
        """Yield the rows to answer, without the first `start` of them.

        Raises:
          OSError: The file cannot be read.
        """
        first, end = self.first_row + start, self.first_row + self.num_rows
        if self.pictures is not None:
            yield from (BatchRow(name, {"image": name}) for name in self.pictures[first:end])
            return
        with self.path.open("rb") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            for number, line in islice(lines, first, end):
                yield BatchRow(f"line {number}", _parse_line(line))


def read_requests(path: Path) -> RequestsFile:
    """Read a file of requests once, to find its format and the number of its rows.

    Raises:
      DataError: The file cannot be read or has no rows, or the folder has no pictures.
    """
    if path.is_dir():
        return _list_pictures(path)
    if is_git_lfs_pointer(path):
        raise DataError(f"{path} is {GIT_LFS_POINTER}")
    digest, num_rows = hashlib.sha256(), 0
    found: RequestsFormat | None = None
    try:
        with path.open("rb") as file:
            for line in file:
                if not num_rows and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise DataError(f"{path} is UTF-16, expected UTF-8; save it in this encoding")
                digest.update(line)
                num_rows += bool(line.strip())
                if found is None and isinstance(value := _parse_line(line), dict):
                    found = "openai" if OPENAI_KEYS & value.keys() else "plain"
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not num_rows:
        raise DataError(f"{path}: no rows")
    return RequestsFile(path, found or "plain", num_rows, digest.hexdigest())


def _list_pictures(folder: Path) -> RequestsFile:
    names = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()
    )
    pictures = tuple(
        name.as_posix() for name in names if not any(part[0] == "." for part in name.parts)
    )
    if not pictures:
        raise DataError(
            f"{folder}: the folder has no picture, which is a file whose name ends with one of"
            f" {', '.join(sorted(PICTURE_SUFFIXES))}"
        )
    digest = hashlib.sha256(json.dumps(pictures).encode()).hexdigest()
    return RequestsFile(folder, "plain", len(pictures), digest, pictures)


def _parse_line(line: bytes) -> Any:
    """Return the JSON value of a line, or a `DataError` if the line is not valid JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return DataError(f"not JSON: {error}")
