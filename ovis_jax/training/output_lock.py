"""A lock on a run's output folder, so that two runs never write to the same folder."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ovis_jax.errors import TrainingError

LOCK_FILE = ".lock"
OWNER_FILE = ".owner"


@contextmanager
def lock_output(folder: Path) -> Iterator[None]:
    """Create an output folder if it does not exist, and own it while the block runs.

    If this process dies, the system releases the lock. A separate file describes the owner, because
    some versions of filelock empty the lock file.

    Raises:
      TrainingError: Another process owns the folder. The error names it.
      OSError: A file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / LOCK_FILE), folder / OWNER_FILE
    try:
        lock.acquire(timeout=0)
    except Timeout:
        name = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        raise TrainingError(
            f"{folder} is in use by {name}, which is still running; wait for it or stop it, or"
            " choose another output_dir"
        ) from None
    try:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        owner.write_text(
            f"process {os.getpid()} on {socket.gethostname()}, started {started}", encoding="utf-8"
        )
        yield
    finally:
        lock.release()
