"""Runs `convert` in forks of itself, because starting a process takes seconds.

`python -m tests.conversion.fork_server` reads one JSON object per line: the arguments of the
command, further environment variables, a file for the output, and a fault. For each it prints the
id of the fork and then its exit code.
"""

import contextlib
import errno
import json
import os
import resource
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import typer
from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers

from ovis_jax.console import exit_on_error
from ovis_jax.conversion import shard_downloads, tensor_chunks
from ovis_jax.conversion.from_hf import convert
from ovis_jax.errors import OvisError

APP = typer.Typer(add_completion=False)
APP.command()(convert)


def inject_fault(key: str, fault: str) -> None:
    """Inject a fault.

    ("file size limit", BYTES); ("announce stop", FIFO) writes to the FIFO when downloads are being
    stopped; (KEY, "read error") and (KEY, "touch") fail or change the file when the first chunk of
    a tensor has been read.
    """
    if key == "file size limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault), int(fault)))
    if key == "announce stop":
        stop = shard_downloads.ShardDownloader.stop

        def announce_stop(downloader: shard_downloads.ShardDownloader) -> None:
            downloader._stopped.set()
            Path(fault).write_text("stopping")
            stop(downloader)

        shard_downloads.ShardDownloader.stop = announce_stop
    original = tensor_chunks.read_chunks

    def read_chunks(info: tensor_chunks.TensorInfo, *arguments: int) -> Iterator[memoryview]:
        for chunk in original(info, *arguments):
            yield chunk
            if info.key == key and fault == "read error":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(info.path))
            elif info.key == key:
                os.utime(info.path)

    tensor_chunks.read_chunks = read_chunks


def run(
    arguments: list[str], environment: dict[str, str], output: str, fault: tuple[str, str] | None
) -> None:
    """Run the command in this process."""
    if fault is not None:
        inject_fault(*fault)
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    # A shell starts background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with exit_on_error():
        APP(arguments)


def main() -> None:
    """Serve until the input ends."""
    warnings.simplefilter("ignore")  # JAX warns about forks; nothing here computes
    # Everything that is imported or read at first use.
    build_hf_headers()
    with contextlib.suppress(OvisError):
        APP(["nowhere", "nothing"])
    constants.DOWNLOAD_CHUNK_SIZE = 1 << 14  # so that downloads of small files can be resumed
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                run(**json.loads(line))
            except SystemExit as exit_:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(int(exit_.code or 0))
            finally:
                os._exit(99)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
