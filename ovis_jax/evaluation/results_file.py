"""Results files: JSON lines files with a header line, then one result per line.

An interrupted evaluation resumes from its results file. A results file from a different model, or
for different questions or settings, is rejected.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from ovis_jax.errors import DataError
from ovis_jax.evaluation.evaluate import QuestionResult
from ovis_jax.evaluation.questions import EvalQuestion
from ovis_jax.inputs.parquet_rows import ParquetImage
from ovis_jax.process_agreement import agree

FORMAT = "ovis-jax eval 2"
SAMPLES_PER_FILE = 256
SAMPLE_BYTES = 4096


def fingerprint_model(folders: Sequence[Path]) -> str:
    """Hash the config files of a model, and evenly spaced samples from every weight file.

    Sampling keeps this fast for large models. A fine-tuned model gets a different fingerprint,
    unless less than 1/256 of each file has changed.
    """
    digest = hashlib.sha256()
    for folder in folders:
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")])
        for path in files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for n in range(SAMPLES_PER_FILE):
                    file.seek(size * n // SAMPLES_PER_FILE)
                    digest.update(file.read(min(SAMPLE_BYTES, -(-size // SAMPLES_PER_FILE))))
    return digest.hexdigest()


def fingerprint_questions(questions: Sequence[EvalQuestion]) -> str:
    """Hash the prompts, the expected answers, and the image paths relative to the question file.

    An image in a parquet file is represented by its place in the file.
    """
    digest = hashlib.sha256()
    for question in questions:
        values = asdict(question)
        del values["row"]["name"]
        folder = Path(question.row.name.rpartition(": row ")[0]).parent
        values["row"]["images"] = [
            image._replace(file="", folder="")
            if isinstance(image, ParquetImage)
            else image.removeprefix(f"{folder}{os.sep}")
            for image in question.row.images
        ]
        digest.update(json.dumps(values, sort_keys=True).encode())
    return digest.hexdigest()


class ResultsFile:
    """A results file that is created, or resumed if it exists.

    Args:
      path: Path of the file; None keeps the results in memory only.
      header: Strings and numbers, by name, that identify the evaluation.
      read_only: Whether to read the results that are already in the file, and write nothing.

    Attributes:
      results: All results, including those that were already in the file.

    Raises:
      DataError: The file is not a results file, or it belongs to a different evaluation.
      OSError: The file cannot be read or written.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any], *, read_only: bool = False):
        self.results: list[QuestionResult] = []
        self._file = None
        if path is None:
            return
        header = {"format": FORMAT, **header}
        if path.exists() and path.stat().st_size:
            text = path.read_bytes()
            complete = text[: text.rfind(b"\n") + 1]  # drops an incomplete last line
            self.results = _parse_results(path, complete, header)
            if read_only:
                return
            if len(complete) < len(text):
                path.write_bytes(complete)
            self._file = path.open("a", encoding="utf-8")
        elif not read_only:
            self._file = path.open("w", encoding="utf-8")
            self._write(header)

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def add(self, result: QuestionResult) -> None:
        """Add a result and write it to the file."""
        self.results.append(result)
        self._write(result)

    def _write(self, value: Mapping[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(value, ensure_ascii=False) + "\n")
            self._file.flush()


def open_results(path: Path | None, header: Mapping[str, Any]) -> ResultsFile:
    """Open a results file, which process 0 writes and all other processes read.

    Raises:
      DataError, OSError: As in `ResultsFile`.
      OvisError: With several processes, the evaluation or the results in the file differ.
    """
    file = None
    with agree("the evaluation") as values:
        values.update({name: str(value) for name, value in header.items()})
        if jax.process_index() == 0:
            file = ResultsFile(path, header)
    with agree(f"{path}, which all processes must share") as values:
        file = file or ResultsFile(path, header, read_only=True)
        values["results"] = str(len(file.results))
    return file


def _parse_results(path: Path, text: bytes, header: Mapping[str, Any]) -> list[QuestionResult]:
    """Parse the results in a file, and check that its header line equals `header`."""
    try:
        # splitlines() would also split at Unicode line separators, which JSON does not escape.
        found, *results = [json.loads(line) for line in text.decode("utf-8-sig").split("\n")[:-1]]
    except ValueError:
        found, results = {}, []
    values = [found, *results]
    if not all(isinstance(value, dict) for value in values) or found.get("format") != FORMAT:
        raise DataError(
            f"{path} is not a results file of format {FORMAT!r}; give --output another name"
        )
    for key, value in header.items():
        if found.get(key) != value:
            raise DataError(
                f"{path} has the results of a different evaluation ({key} is {found.get(key)!r}"
                f" there and {value!r} here); give --output another name, or remove the file"
            )
    return results
