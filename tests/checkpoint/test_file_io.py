"""System errors that name their file."""

import errno
from pathlib import Path

import pytest

from ovis_jax.checkpoint.file_io import add_file_name_to_os_errors, write_json


def test_full_disk_names_its_file():
    with pytest.raises(OSError, match="No space left on device; make room for") as error:
        write_json(Path("/dev/full"), {})
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "/dev/full")


def test_network_error_names_no_file():
    with (
        pytest.raises(ConnectionResetError) as error,
        add_file_name_to_os_errors(Path("being written")),
    ):
        raise ConnectionResetError(errno.ECONNRESET, "reset by peer")
    assert error.value.filename is None
