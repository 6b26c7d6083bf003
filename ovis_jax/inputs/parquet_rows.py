"""Rows of parquet files. Texts are read at once; image bytes are read when an image is opened.

The columns `image` and `images` may contain image bytes, as Hugging Face's datasets writes them:
structs `{bytes, path}`, plain binary values, or lists of these. An image's bytes are read with the
row group that contains it, so the size of a row group bounds the memory.
"""

import os
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from ovis_jax.errors import DataError, require_extra

MAGIC = b"PAR1"
CACHED_COLUMNS = 4
"""Number of image columns that stay in memory; each is a column of one row group."""

_lock = Lock()


class ParquetImage(NamedTuple):
    """The place of an image in a parquet file.

    Attributes:
      file: Path of the parquet file.
      row_group: Index of the row group.
      column: Name of the column.
      row: Index of the row in its row group.
      index: Index in the row's list of images; None if the row has a single image.
      folder: The folder that the path is relative to if the image is not stored as bytes.
    """

    file: str
    row_group: int
    column: str
    row: int
    index: int | None = None
    folder: str = ""

    def read(self) -> bytes | str:
        """Return the bytes of the image file, or its path if the bytes are not stored.

        Raises:
          DataError: The parquet file cannot be read, or the image has neither bytes nor a path.
        """
        with _lock:  # so that threads do not read the same row group twice
            column = _read_column(self.file, self.row_group, self.column)
        value = column[self.row]
        value = (value if self.index is None else value[self.index]).as_py()
        if not isinstance(value, dict):
            return value
        if value.get("bytes"):
            return value["bytes"]
        if not value.get("path"):
            raise DataError(
                f"{self.column} in {self.file} is {value}, expected bytes or a path; write null if"
                " there is no image"
            )
        return os.path.join(self.folder, value["path"])


def is_parquet(path: Path) -> bool:
    """Return whether the first bytes of a file are those of a parquet file."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_parquet_rows(path: Path, image_columns: Collection[str]) -> list[dict[str, Any]]:
    """Read all rows, with a `ParquetImage` in place of each image that is not a path.

    Raises:
      DataError: The file cannot be read.
      OvisError: pyarrow is not installed.
    """
    file = _open(str(path))
    leaves = [file.schema.column(n) for n in range(len(file.schema))]
    tops = {leaf.path: leaf.path.split(".")[0] for leaf in leaves}
    names = [
        leaf.path
        for leaf in leaves
        if tops[leaf.path] not in image_columns or leaf.logical_type.type == "STRING"
    ]
    # An image column without strings is read to know which rows have images.
    names += [x for x in tops if tops[x] not in {tops[name] for name in names}]
    rows: list[dict[str, Any]] = []
    for group in range(file.num_row_groups):
        for number, row in enumerate(_read_row_group(file, path, group, names).to_pylist()):
            for column in image_columns:
                value = row.get(column)
                place = ParquetImage(str(path), group, column, number)
                if isinstance(value, list):
                    row[column] = [
                        _locate(image, place._replace(index=n)) for n, image in enumerate(value)
                    ]
                elif value is not None:
                    row[column] = _locate(value, place)
            rows.append(row)
    return rows


def _locate(image: Any, place: ParquetImage) -> Any:
    return place if isinstance(image, dict | bytes) else image


@lru_cache(maxsize=CACHED_COLUMNS)
def _read_column(file: str, row_group: int, column: str) -> Any:
    return _read_row_group(_open(file), Path(file), row_group, [column]).column(column)


def _read_row_group(file: Any, path: Path, row_group: int, columns: list[str]) -> Any:
    try:
        return file.read_row_group(row_group, columns=columns, use_threads=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: row group {row_group} cannot be read: {error}") from error


def _open(path: str) -> Any:
    with require_extra("train"):
        from pyarrow import parquet
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error
