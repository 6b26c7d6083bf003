"""Results files: JSON lines files with one result per row of the requests file, in the same order.

An interrupted run resumes from its results file. The settings of the run are in a second file next
to it, because programs that read OpenAI's batch format expect only results. A results file of a
different run is rejected.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ovis_jax.checkpoint.file_io import add_file_name_to_os_errors, write_json
from ovis_jax.errors import DataError
from ovis_jax.json_fields import read_json

FORMAT = "ovis-jax batch 1"


class BatchResultsFile:
    """A results file that is created, or resumed if it exists.

    Args:
      path: Path of the file.
      settings: Settings by name that identify the run. The values must be JSON-serializable.
      num_rows: Number of rows of the file of requests.
      has_failed: Function that returns whether a result is an error.

    Attributes:
      path: Path of the file.
      num_results: Number of results in the file.
      num_failed: Number of results in the file that are errors.

    Raises:
      DataError: The file is not a results file, or it belongs to a different run.
      OSError: The file cannot be read or written.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        num_rows: int,
        has_failed: Callable[[dict[str, Any]], bool],
    ):
        self.path, self._has_failed = path, has_failed
        self.num_results = self.num_failed = 0
        settings = json.loads(json.dumps({"format": FORMAT, **settings}))
        settings_path = path.with_name(f"{path.name}.run.json")
        if path.exists() and path.stat().st_size:
            self._check_same_run(settings_path, settings)
            self._read_results(num_rows)
        else:
            # The file is replaced by renaming, so it stays intact if the process is killed.
            partial = settings_path.with_name(f"{settings_path.name}.new")
            write_json(partial, settings)
            partial.replace(settings_path)
        self._file = path.open("ab")

    def __enter__(self) -> "BatchResultsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, result: dict[str, Any]) -> None:
        """Append the result of the next row.

        Raises:
          OSError: The file cannot be written.
        """
        # UTF-8 has no unpaired surrogates, which are possible in JSON strings.
        line = json.dumps(result, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with add_file_name_to_os_errors(self.path):
            self._file.write(line)
            self._file.flush()
        self._count(result)

    def _count(self, result: dict[str, Any]) -> None:
        self.num_results += 1
        self.num_failed += self._has_failed(result)

    def _check_same_run(self, settings_path: Path, settings: Mapping[str, Any]) -> None:
        found = read_json(settings_path) if settings_path.exists() else {}
        if found.get("format") != FORMAT:
            raise DataError(
                f"{self.path} is not a results file of format {FORMAT!r}, which has its settings in"
                f" {settings_path.name}; give the results another name"
            )
        for key, value in settings.items():
            if found.get(key) != value:
                raise DataError(
                    f"{self.path} has the results of a different run ({key} is {found.get(key)!r}"
                    f" there and {value!r} here); give the results another name, or remove the file"
                )

    def _read_results(self, num_rows: int) -> None:
        """Count the results, and remove an incomplete last line."""
        num_bytes = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                num_bytes += len(line)
                try:
                    self._count(json.loads(line))
                except (ValueError, TypeError, AttributeError, KeyError) as error:
                    raise DataError(
                        f"{self.path}: line {self.num_results + 1} is not a result; remove the file"
                        " to start over"
                    ) from error
        if self.num_results > num_rows:
            raise DataError(
                f"{self.path} has {self.num_results} results for {num_rows} rows; remove the file"
                " to start over"
            )
        os.truncate(self.path, num_bytes)
