"""Checkpoint faults as table rows, collected so that one error reports all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from ovis_jax.errors import CheckpointError


@dataclass(frozen=True)
class CheckpointProblem:
    """One fault of one tensor, or of a whole file if `key` is empty."""

    file: str
    key: str
    problem: str
    expected: str
    found: str

    def __str__(self) -> str:
        where = escape_unprintable(self.file)
        where += f": {escape_unprintable(self.key)}" if self.key else ""
        found = escape_unprintable(self.found)
        return f"{where}: {self.problem}: expected {self.expected}, found {found}"


class CheckpointValidationError(CheckpointError):
    """A checkpoint has one or more faults.

    Attributes:
      summary: the subject, the number of problems and what to do, in one line.
      problems: one row per fault. The message of the error is the summary and these rows.
    """

    def __init__(self, subject: str, problems: Sequence[CheckpointProblem], advice: str) -> None:
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        self.summary = f"{subject}: {count}; {advice}"
        self.problems = tuple(problems)
        super().__init__("\n".join([self.summary, *(f"  {problem}" for problem in problems)]))


class DownloadValidationError(CheckpointValidationError):
    """A downloaded shard has faults; the shards converted before it are valid."""


def escape_unprintable(text: str) -> str:
    """Return text from a file, escaped if a terminal would interpret any of it."""
    return text if text.isprintable() else ascii(text)
