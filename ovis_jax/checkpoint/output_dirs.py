"""Output folders that appear only when they are complete, and conversions that can be resumed."""

import errno
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ovis_jax.checkpoint.checkpoint_problems import DownloadValidationError
from ovis_jax.checkpoint.file_io import write_json
from ovis_jax.errors import CheckpointError, OvisError

RESUME_FILE = "resume.json"
_RESUME_TEMPORARY = "resume.tmp"
_LOCK_FILE = ".lock"
_FILES = "files"


def require_empty(folder: Path) -> None:
    """Check that an output folder either does not exist or is empty.

    Raises:
      OvisError: `folder` exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OvisError(
            f"{folder} exists and is not an empty folder; nothing was written: remove it, or give"
            " another destination"
        )


@contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """Create a folder that is either complete or absent.

    The block writes into a temporary folder next to `folder`, which is renamed to `folder` when the
    block succeeds. On any exception, including an interrupt, the temporary folder is removed.

    Args:
      folder: Folder to create; it must either not exist or be empty.

    Yields:
      The temporary folder.

    Raises:
      OvisError: `folder` exists and is not an empty folder.
      OSError: A folder cannot be created or renamed.
    """
    require_empty(folder)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir()
        yield partial
        _move_folder(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class ResumableDir:
    """An unfinished output folder, with a record of the files that are finished.

    Attributes:
      path: Folder to write into.
      finished: SHA-256 of each finished file by file name; None for a file without a checksum.
    """

    def __init__(self, partial: Path, inputs: Mapping[str, Any]):
        self.path = partial / _FILES
        self.finished: dict[str, str | None] = {}
        self._record = partial / RESUME_FILE
        self._inputs = json.loads(json.dumps(inputs))
        self._sizes: dict[str, int] = {}
        if self.path.is_dir() and any(self.path.iterdir()):
            self._resume(partial)
        self._write_record()
        self.path.mkdir(exist_ok=True)

    def record_finished(self, name: str, sha256: str | None) -> None:
        """Record that a file is complete, so that it is kept when the conversion is resumed.

        Raises:
          OSError: The record cannot be written.
        """
        self.finished[name] = sha256
        self._sizes[name] = (self.path / name).stat().st_size
        self._write_record()

    def _resume(self, partial: Path) -> None:
        """Keep the files that an earlier attempt with the same inputs finished; remove all others.

        After a power failure, a recorded file may be incomplete, which its size reveals.
        """
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            inputs, files = record["inputs"], record["finished"]
        except (OSError, ValueError, KeyError):
            inputs, files = self._inputs, {}
        if inputs != self._inputs:
            changed = [
                f"{key} (was {found})" if isinstance(found, str) and len(found) <= 40 else key
                for key, value in self._inputs.items()
                if (found := inputs.get(key)) != value
            ]
            raise OvisError(
                f"{partial} was started with different inputs: {', '.join(changed)}; use the same"
                " inputs to resume, or remove it to start over"
            )
        for path in self.path.iterdir():
            file = files.get(path.name)
            if file is not None and path.stat().st_size == file["bytes"]:
                self.finished[path.name] = file["sha256"]
                self._sizes[path.name] = file["bytes"]
            else:
                path.unlink()

    def _write_record(self) -> None:
        finished = {
            name: {"bytes": self._sizes[name], "sha256": sha256}
            for name, sha256 in self.finished.items()
        }
        temporary = self._record.with_name(_RESUME_TEMPORARY)
        write_json(temporary, {"inputs": self._inputs, "finished": finished})
        temporary.replace(self._record)


@contextmanager
def resumable_dir(folder: Path, inputs: Mapping[str, Any]) -> Iterator[ResumableDir]:
    """Create a folder that is either complete or absent; interrupted work can be resumed.

    The block writes into `<folder>.partial/files`, which is renamed to `folder` when the block
    succeeds. If the process is killed or the block raises, `<folder>.partial` remains, and the next
    call with the same inputs keeps its finished files. If the block raises `CheckpointError`, the
    source is invalid, so `<folder>.partial` is removed, unless only a downloaded shard was invalid.

    Args:
      folder: Folder to create; it must either not exist or be empty.
      inputs: All inputs that the result depends on, as JSON.

    Yields:
      The unfinished folder.

    Raises:
      OvisError: `folder` is not empty, another process is writing it, or `<folder>.partial` was
        started with different inputs or contains other files.
      OSError: A folder cannot be created or renamed.
    """
    folder = folder.resolve()
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with _lock_folder(partial):
        require_empty(folder)
        names = {path.name for path in partial.iterdir()}
        if RESUME_FILE not in names and names - {_LOCK_FILE, _RESUME_TEMPORARY}:
            raise OvisError(
                f"{partial} contains other files and no {RESUME_FILE}; move them, or give another"
                " destination"
            )
        output = ResumableDir(partial, inputs)
        try:
            yield output
            _move_folder(output.path, folder)
        except BaseException as error:
            invalid = isinstance(error, CheckpointError)
            if invalid and not isinstance(error, DownloadValidationError):
                shutil.rmtree(output.path, ignore_errors=True)
            raise
        finally:
            if not output.path.exists() or not any(output.path.iterdir()):
                with suppress(OSError):
                    output.path.rmdir()
                (partial / RESUME_FILE).unlink(missing_ok=True)


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes; if this process dies, the system releases the lock.

    At the end, the folder and the lock file are removed if the folder contains nothing else.

    Raises:
      OvisError: Another process holds the lock.
      OSError: The lock file cannot be created.
    """
    path = folder / _LOCK_FILE
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OvisError(
            f"another process is writing {folder}; wait for it, or give another destination"
        ) from None
    try:
        yield
    finally:
        unused = {other.name for other in folder.iterdir()} <= {_LOCK_FILE}
        if unused:
            with suppress(OSError):  # Windows cannot remove a file that is open
                path.unlink()
        lock.release()
        if unused:
            with suppress(OSError):
                path.unlink(missing_ok=True)
                folder.rmdir()


def _move_folder(source: Path, target: Path) -> None:
    if target.exists():
        target.rmdir()
    source.rename(target)


def check_disk_space(folder: Path, required: int) -> None:
    """Check that a disk has enough free space before anything is written.

    Args:
      folder: Folder to write into; it does not need to exist yet.
      required: Number of bytes that will be written.

    Raises:
      OSError: The folder's disk has less free space than `required`.
    """
    existing = existing_ancestor(folder)
    free = shutil.disk_usage(existing).free
    if free < required:
        what = f"{required / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; make room in"
        raise OSError(errno.ENOSPC, what, str(existing))


def existing_ancestor(folder: Path) -> Path:
    """Return the folder if it exists, otherwise its nearest existing ancestor."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder
