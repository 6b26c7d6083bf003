"""Runs commands in forks of itself, so that each is spared the seconds that a start takes.

`python -m tests.convert.forked` reads a JSON object a line: the arguments of convert.from_hf, more
environment, and a file for what is printed. It answers each with the exit code.
"""

import contextlib
import io
import json
import os
import signal
import sys
import warnings

import typer
from huggingface_hub.utils import build_hf_headers

from convert.from_hf import command

APP = typer.Typer(add_completion=False)
APP.command()(command)


def run(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """The command, as a process of its own."""
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
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
