"""Folders that are written across interruptions.

Beside the files of an unfinished folder stands a journal, lines of JSON: first what is being made,
then how much of which file has been written and what that much hashes to. Nothing is believed
without being hashed again, so it does not matter in which order a disk kept things.
"""

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from ovis_jax.checkpoint.problems import ShardProblems, naming_file
from ovis_jax.errors import CheckpointError, OvisError

JOURNAL_FILE = "journal.jsonl"
MARK_BYTES = 1 << 28
"""About how much is written between two marks: so much is written again after an interruption."""
_CHUNK = 1 << 23


class Digest(Protocol):
    """What hashlib's objects do."""

    def update(self, data: Any, /) -> None: ...  # noqa: D102
    def hexdigest(self) -> str: ...  # noqa: D102
    def copy(self) -> Self: ...  # noqa: D102


class Crc:
    """A checksum against accidents alone, several times as fast as sha256."""

    def __init__(self, value: int = 0):
        self._value = value

    def update(self, data: Any, /) -> None:  # noqa: D102
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:  # noqa: D102
        return f"{self._value:08x}"

    def copy(self) -> "Crc":  # noqa: D102
        return Crc(self._value)


@dataclass
class Written:
    """How much of a file stands, and the digest of that much."""

    size: int
    digest: Digest


class Journal:
    """What an unfinished folder holds; see `unfinished`, which makes it.

    Args:
      folder: the unfinished folder.
      checksums: whether files are hashed by sha256, or by `Crc` where nobody asks for them.
    """

    def __init__(self, folder: Path, *, checksums: bool):
        self.kept = 0
        """Bytes of earlier attempts that need not be written again."""
        self._path = folder / JOURNAL_FILE
        self._folder = folder
        self.checksums = checksums

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Hold what an earlier attempt has left to the same facts, or begin with them.

        Raises:
          OvisError: it was making something else.
          OSError: the journal cannot be read or written.
        """
        facts = json.loads(json.dumps(facts))
        lines = self._lines() or [facts]
        if lines[0] != facts:
            changed = [
                f"{key} (it was {found})" if isinstance(found, str) and len(found) <= 40 else key
                for key in facts
                if (found := lines[0].get(key)) != facts[key]
            ]
            raise OvisError(
                f"{self._folder} is an unfinished result of other input: not the same are"
                f" {', '.join(changed)}; give what it was begun with, or remove it to start again"
            )
        # Without a line that was cut short, which the next one would continue.
        whole = "".join(json.dumps(line) + "\n" for line in lines)
        with naming_file(self._path):
            self._path.write_text(whole, encoding="utf-8")

    def _lines(self) -> list[dict[str, Any]]:
        """The lines as far as they are whole."""
        if not self._path.exists():
            return []
        found = []
        for text in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                break
            if not isinstance(line, dict):
                break
            found.append(line)
        return found

    def mark(self, name: str, written: Written) -> None:
        """Note how far a file has been written; the file itself must have been flushed."""
        line = {"file": name, "bytes": written.size, "digest": written.digest.hexdigest()}
        with naming_file(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def standing(self, name: str) -> Written:
        """How much of a file can be kept: all that the last mark says which still hashes to it.

        Raises:
          OSError: the file cannot be read.
        """
        new: Written = Written(0, hashlib.sha256() if self.checksums else Crc())
        path = self._folder / name
        lines = [line for line in self._lines()[1:] if line.get("file") == name]
        marks = {x["bytes"]: x["digest"] for x in lines if x.keys() >= {"bytes", "digest"}}
        if not path.exists() or not marks:
            return new
        kept, size, digest = new, 0, new.digest.copy()
        with naming_file(path), path.open("rb") as file:
            for end in sorted(marks):
                for piece in _read(file, end - size):
                    digest.update(piece)
                    size += len(piece)
                if size < end or digest.hexdigest() != marks[end]:
                    break
                kept = Written(size, digest.copy())
        self.kept += kept.size
        return kept


def _read(file: Any, size: int) -> Iterator[bytes]:
    """The next bytes of a file in pieces; fewer where it ends."""
    while size and (piece := file.read(min(size, _CHUNK))):
        yield piece
        size -= len(piece)


@contextmanager
def unfinished(
    folder: Path, facts: Mapping[str, Any], *, checksums: bool = True
) -> Iterator[tuple[Path, Journal]]:
    """A folder to write into, `<name>.partial`, which takes its name when the block ends well.

    When the block does not end, or ends in an interruption or an OSError, it stays, and the same
    call goes on with it. A CheckpointError says that what was read is wrong: it is then removed,
    unless what it was made of so far is right.

    Args:
      folder: what is to be made; it must not exist, or be empty.
      facts: what the result depends on, as JSON.
      checksums: see `Journal`.

    Raises:
      OvisError: another process is writing it, what stands was begun with other facts, or it holds
        files of something else.
      OSError: a folder cannot be made or renamed.
    """
    folder, partial = folder.resolve(), _partial(folder)
    partial.mkdir(parents=True, exist_ok=True)
    ended = partial.with_name(f"{partial.name}.journal")
    with _held(partial):
        _take_up(partial, ended)
        journal = Journal(partial, checksums=checksums)
        journal.begin(facts)
        try:
            yield partial, journal
        except CheckpointError as error:
            if not isinstance(error, ShardProblems):
                _remove(partial)
            raise
        # Beside it until it has its name, for a kill between the two.
        (partial / JOURNAL_FILE).rename(ended)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
        ended.unlink()


def _take_up(partial: Path, ended: Path) -> None:
    """Hold a folder to be empty or of an earlier attempt, whose journal may stand beside it.

    Raises:
      OvisError: it holds files, and no journal.
      OSError: a folder cannot be read, or a journal moved.
    """
    if (partial / JOURNAL_FILE).exists():
        return
    if not any(partial.iterdir()):
        ended.unlink(missing_ok=True)
    elif ended.exists():
        ended.rename(partial / JOURNAL_FILE)
    else:
        raise OvisError(
            f"{partial} holds files of something else: there is no {JOURNAL_FILE}; move them, or"
            " give another destination"
        )


def _remove(partial: Path) -> None:
    """Remove an unfinished folder, its journal last: what is left of it is then known as ours."""
    with suppress(OSError):
        for path in partial.iterdir():
            if path.name != JOURNAL_FILE:
                path.unlink()
        shutil.rmtree(partial)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep every other process away from a folder; the system lets go of it should we be killed.

    Raises:
      OvisError: another process has it.
      OSError: it is not there.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it may have finished and renamed it after we opened it.
            held = folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())
        except BlockingIOError:
            held = False
        if not held:
            raise OvisError(
                f"another process is writing {folder}; wait for it, or give another destination"
            )
        yield
    finally:
        os.close(descriptor)


def left_behind(folder: Path) -> int:
    """Bytes that an interrupted attempt to make `folder` takes on the disk."""
    partial = _partial(folder)
    return sum(path.stat().st_size for path in partial.iterdir()) if partial.is_dir() else 0


def _partial(folder: Path) -> Path:
    return folder.resolve().with_name(f"{folder.resolve().name}.partial")
