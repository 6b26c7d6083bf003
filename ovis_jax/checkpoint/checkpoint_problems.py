"""Checkpoint faults as table rows; one error reports all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from ovis_jax.errors import CheckpointError


@dataclass(frozen=True)
class CheckpointProblem:
    """One fault in one tensor, or in a whole file if `key` is empty."""

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
      summary: One line with the subject, the number of problems and what to do.
      problems: One row per fault. The error message consists of the summary and these rows.
    """

    def __init__(self, subject: str, problems: Sequence[CheckpointProblem], advice: str) -> None:
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        self.summary = f"{subject}: {count}; {advice}"
        self.problems = tuple(problems)
        super().__init__("\n".join([self.summary, *(f"  {problem}" for problem in problems)]))


class DownloadValidationError(CheckpointValidationError):
    """A downloaded shard has faults; all shards converted before it are valid."""


def escape_unprintable(text: str) -> str:
    """Return text from a file, escaped if it contains terminal control characters."""
    return text if text.isprintable() else ascii(text)
