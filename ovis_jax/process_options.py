"""Options of commands that run in several processes, and how these processes end."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Annotated

import jax
import typer
from rich.console import Console

from ovis_jax.console import exit_on_error, print_error
from ovis_jax.distributed import (
    check_same_number_of_devices,
    initialize_distributed,
    initialize_from_environment,
)
from ovis_jax.errors import OvisError
from ovis_jax.process_agreement import is_agreed

DistributedOption = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="Run in several processes that a TPU pod, SLURM, Open MPI or Kubernetes has started.",
    ),
]
CoordinatorOption = Annotated[
    str | None,
    typer.Option(help="HOST:PORT of process 0, to run in processes that you start yourself."),
]
NumProcessesOption = Annotated[
    int | None, typer.Option(min=1, help="Number of processes, with --coordinator.")
]
ProcessIdOption = Annotated[
    int | None, typer.Option(min=0, help="Index of this process from 0, with --coordinator.")
]


@contextmanager
def run_in_processes(
    distributed: bool, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Iterator[None]:
    """Join the other processes, if options ask for it, and run the block.

    Only process 0 prints on stdout; every process prints on stderr.

    If the block raises an error in one process only, this process prints the error and ends at
    once. The others cannot receive it, because they may wait for this process in a collective
    operation. JAX ends them when it finds that this process has ended.

    Raises:
      OvisError: The options contradict each other, or other processes cannot be reached.
    """
    given = [x is not None for x in (coordinator, num_processes, process_id)]
    if any(given) and (distributed or not all(given)):
        raise OvisError(
            "expected either --distributed alone, or --coordinator, --num-processes and"
            " --process-id together"
        )
    if distributed:
        initialize_from_environment()
    elif coordinator is not None and num_processes is not None and process_id is not None:
        initialize_distributed(coordinator, num_processes, process_id)
    else:
        yield
        return
    try:
        with exit_on_error(), ExitStack() as stack:
            check_same_number_of_devices()
            if jax.process_index() > 0:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(redirect_stdout(nowhere))
            yield
    except BaseException as error:
        if isinstance(error, SystemExit) and is_agreed(error.__context__ or error):
            raise
        os._exit(_report_end(error))


def _report_end(error: BaseException) -> int:
    """Print why this process ends, and return its exit code."""
    code = 1
    if isinstance(error, SystemExit):  # the error has been printed
        code = error.code if isinstance(error.code, int) else 1
    elif isinstance(error, jax.errors.JaxRuntimeError):
        reason = str(error).partition("\n")[0]
        print_error(
            Console(stderr=True, highlight=False),
            f"process {jax.process_index()}: {reason}. If a connection was lost, another process"
            " has ended, and its own output says why",
        )
    elif isinstance(error, KeyboardInterrupt):
        code = 130
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    return code
