"""Runs commands in forks of itself, so that each is spared the seconds that a start takes.

`python -m tests.convert.forked` reads a JSON object a line: the arguments of convert.from_hf, more
environment, a file for what is printed, and what happens at which tensor. It answers each with the
process's id, and then with its exit code.
"""

import contextlib
import errno
import io
import json
import os
import resource
import signal
import sys
import warnings
from collections.abc import Iterator

import typer
from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers

from convert import transfer
from convert.from_hf import command

APP = typer.Typer(add_completion=False)
APP.command()(command)


def happens(key: str, what: str) -> None:
    """Let something happen when the first piece of a tensor has been read; or limit files."""
    if key == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(what), int(what)))
    true = transfer.read_chunks

    def read_chunks(entry: transfer.TensorEntry, *more: int) -> Iterator[memoryview]:
        for piece in true(entry, *more):
            yield piece
            if entry.key == key and what == "read error":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(entry.path))
            elif entry.key == key:
                os.utime(entry.path)

    transfer.read_chunks = read_chunks


def run(
    arguments: list[str], environment: dict[str, str], output: str, at: tuple[str, str] | None
) -> None:
    """The command, as a process of its own."""
    if at is not None:
        happens(*at)
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    # A test run in the background of a shell would hand SIGINT down as ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    APP(arguments)


def main() -> None:
    """Serve until the input ends."""
    warnings.simplefilter("ignore")  # JAX warns of forks; nothing here computes
    # What is imported and looked up at first use, once for all.
    build_hf_headers()
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        APP(["nowhere", "nothing"])
    constants.DOWNLOAD_CHUNK_SIZE = 1 << 14  # so that even small files are resumed in their middle
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                run(**json.loads(line))
            except SystemExit as ended:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(int(ended.code or 0))
            finally:
                os._exit(99)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
