"""A file of results: JSON lines, the first of which says of what, then one for each answer.

A run that was stopped goes on from what the file holds; another model's or other questions' is
refused.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ovis_jax.errors import DataError
from ovis_jax.evaluation.questions import Question

FORMAT = "ovis-jax eval 1"
SAMPLES = 256
SAMPLE_BYTES = 4096

Result = Mapping[str, Any]
"""The keys id, kind, right, answer, read and expected; see `run.evaluate`."""


def model_fingerprint(folders: Sequence[Path]) -> str:
    """A hash of the config and of samples from all over every file of weights.

    So it takes no longer for large models. A model of which a part was trained has another one,
    unless less than a 256th of each file was.
    """
    found = hashlib.sha256()
    for folder in folders:
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")])
        for path in files:
            size = path.stat().st_size
            found.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for n in range(SAMPLES):
                    file.seek(size * n // SAMPLES)
                    found.update(file.read(min(SAMPLE_BYTES, -(-size // SAMPLES))))
    return found.hexdigest()


def questions_fingerprint(questions: Sequence[Question]) -> str:
    """A hash of everything that is asked and expected; of images, the paths from their file's."""
    found = hashlib.sha256()
    for question in questions:
        values = asdict(question)
        del values["row"]["name"]
        folder = Path(question.row.name.rpartition(": row ")[0]).parent
        values["row"]["images"] = [
            str(Path(image).relative_to(folder)) if Path(image).is_relative_to(folder) else image
            for image in question.row.images
        ]
        found.update(json.dumps(values, sort_keys=True).encode())
    return found.hexdigest()


class Results:
    """A file of results, made or taken up again.

    Args:
      path: the file; None keeps the results in memory alone.
      head: what they are of: texts and numbers, by name.

    Raises:
      DataError: the file is not one of results, or is of something else.
      OSError: it cannot be read or written.
    """

    def __init__(self, path: Path | None, head: Mapping[str, Any]):
        self.done: list[Result] = []
        self._file = None
        if path is None:
            return
        wanted = {"format": FORMAT, **head}
        if path.exists() and path.stat().st_size:
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]  # a line that was being written goes
            lines = _lines(path, whole)
            _check_head(path, lines[0] if lines else {}, wanted)
            self.done = list(lines[1:])
            if len(whole) < len(text):
                path.write_bytes(whole)
            self._file = path.open("a", encoding="utf-8")
        else:
            self._file = path.open("w", encoding="utf-8")
            self._write(wanted)

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def add(self, result: Result) -> None:
        """Keep a result, in the file at once."""
        self.done.append(result)
        self._write(result)

    def _write(self, value: Mapping[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(value, ensure_ascii=False) + "\n")
            self._file.flush()


def _lines(path: Path, text: bytes) -> list[dict[str, Any]]:
    try:
        # Not splitlines(), which takes characters that JSON leaves as they are for ends of lines.
        values = [json.loads(line) for line in text.decode("utf-8").split("\n")[:-1]]
        if all(isinstance(value, dict) for value in values):
            return values
    except ValueError:
        pass
    raise DataError(f"{path} is not a file of results; give another name to --out")


def _check_head(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if found.get("format") != FORMAT:
        raise DataError(f"{path} is not a file of results; give another name to --out")
    for key, value in wanted.items():
        if found.get(key) != value:
            raise DataError(
                f"{path} holds results of other {key.replace('_', ' ')}: {found.get(key)!r}, not "
                f"{value!r}; give another name to --out, or remove the file"
            )
