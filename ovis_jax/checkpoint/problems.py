"""What is wrong with a checkpoint, one row a fault, collected so that all are told at once."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ovis_jax.errors import CheckpointError


@dataclass(frozen=True)
class Problem:
    """One fault of one tensor (or, where `key` is empty, of a whole file)."""

    file: str
    key: str
    problem: str
    expected: str
    found: str

    def __str__(self) -> str:
        where = printable(self.file) + (f": {printable(self.key)}" if self.key else "")
        return f"{where}: {self.problem}: expected {self.expected}, found {printable(self.found)}"


class CheckpointProblems(CheckpointError):
    """A checkpoint with one or more faults; `problems` holds the rows, the message tells them."""

    def __init__(self, subject: str, problems: Sequence[Problem], advice: str) -> None:
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        self.summary = f"{subject}: {count}; {advice}"
        self.problems = tuple(problems)
        super().__init__("\n".join([self.summary, *(f"  {problem}" for problem in problems)]))


class ShardProblems(CheckpointProblems):
    """Faults of a file that was fetched; what was made of the files before it is right."""


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Give an error of the system the name of the file, which only opening one gives it.

    Raises:
      OSError: the block did; of a full disk it says what to do. An error of the network, from where
        a file may come while another is written, is left as it is.
    """
    try:
        yield
    except OSError as error:
        network = isinstance(error, ConnectionError | TimeoutError)
        if error.errno is None or error.filename is not None or network:
            raise
        advice = "; make room for" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise OSError(error.errno, f"{error.strerror}{advice}", str(path)) from error


def printable(text: str) -> str:
    """Text from a file, escaped where a terminal would not show it as it is."""
    return text if text.isprintable() else ascii(text)
