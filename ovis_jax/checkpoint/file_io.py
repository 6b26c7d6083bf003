"""Writing JSON files, and adding file names to operating system errors."""

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def add_file_name_to_os_errors(path: Path) -> Iterator[None]:
    """Add a file name to any `OSError` that the block raises.

    The operating system names a file only if opening it fails. Network errors stay unchanged,
    because a download can be in progress while another file is written.

    Args:
      path: File that the block reads or writes.

    Raises:
      OSError: The block raised an `OSError`. If the disk is full, the message says what to do.
    """
    try:
        yield
    except OSError as error:
        network = isinstance(error, ConnectionError | TimeoutError)
        if error.errno is None or error.filename is not None or network:
            raise
        advice = "; make room for" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise OSError(error.errno, f"{error.strerror}{advice}", str(path)) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as JSON, formatted like the JSON files on the Hub.

    Raises:
      OSError: The file cannot be written.
    """
    with add_file_name_to_os_errors(path):
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
