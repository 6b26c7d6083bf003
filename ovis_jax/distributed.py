"""Starting several processes: all must report before `jax.distributed.initialize` is called.

When `jax.distributed.initialize` times out, JAX aborts the process without naming the missing
processes. Therefore, all processes first report to the coordinator's address. If a process is
missing, all others raise an ordinary error that names the missing process.
"""

import contextlib
import os
import socket
import time
from collections import Counter

import jax

from ovis_jax.errors import OvisError

RETRY_SECONDS = 0.1
"""Pause between two attempts to reach the coordinator, in seconds."""
REPORT_SECONDS = 5.0
"""Maximum time for a connected process to send its index, in seconds."""
HEARTBEAT_TIMEOUT_SECONDS = 20
"""If a process dies, JAX ends all others after this time."""
DEFAULT_PORT = 8476
"""Port of process 0 if the environment names only its host; JAX uses the same one on TPUs."""


def initialize_distributed(
    coordinator_address: str, num_processes: int, process_id: int, *, timeout: float = 300.0
) -> None:
    """Let this process join a group of processes whose devices JAX uses together.

    Call this function before JAX creates any array. Afterwards, `jax.devices()` lists the devices
    of all processes. Every process must then build the same mesh and call `load`, `generate` and
    the other functions with the same arguments. If a process dies, JAX ends all others within about
    20 seconds.

    Args:
      coordinator_address: "host:port" of process 0, the same for all processes.
      num_processes: Number of processes.
      process_id: Index of this process, from 0.
      timeout: Seconds to wait for the other processes.

    Raises:
      OvisError: The address or the index is invalid, two processes have the same index, or some
        processes did not report in time. In the last case, the error names the missing processes.
      OSError: Process 0 cannot listen on the port.
    """
    host, _, port = coordinator_address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise OvisError(
            f"coordinator_address is {coordinator_address!r}, expected host:port of process 0"
        )
    if not 0 <= process_id < num_processes:
        raise OvisError(
            f"process_id is {process_id}, expected 0 to {num_processes - 1} for {num_processes}"
            " processes"
        )
    if process_id == 0:
        error = _collect_reports(host, int(port), num_processes, timeout)
    else:
        error = _report(host, int(port), process_id, timeout)
    if error:
        raise OvisError(error)
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        initialization_timeout=max(int(timeout), 1),
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
    )


def initialize_from_environment() -> None:
    """Let this process join the processes that a TPU pod or a cluster has started with it.

    Supports the environments that `jax.distributed.initialize` detects (TPU pods, SLURM, Open MPI,
    Jobs and JobSets of Kubernetes), and LeaderWorkerSets of Kubernetes.

    Raises:
      OvisError: There is no such environment, or the other processes cannot be reached.
    """
    if leader := os.environ.get("LWS_LEADER_ADDRESS"):
        port = os.environ.get("JAX_COORDINATOR_PORT", DEFAULT_PORT)
        try:
            size, index = int(os.environ["LWS_GROUP_SIZE"]), int(os.environ["LWS_WORKER_INDEX"])
        except (KeyError, ValueError) as error:
            raise OvisError(
                f"LWS_LEADER_ADDRESS is set, but LWS_GROUP_SIZE or LWS_WORKER_INDEX is not a number"
                f" ({error}); LeaderWorkerSet sets all three since version 0.6"
            ) from error
        initialize_distributed(f"{leader}:{port}", size, index)
        return
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS)
    except (ValueError, RuntimeError) as error:
        raise OvisError(
            f"JAX cannot join other processes: {error}; it detects TPU pods, SLURM, Open MPI and"
            " Kubernetes. Elsewhere, give the coordinator, the number of processes and the index of"
            " this process"
        ) from error


def describe_devices() -> str:
    """Return how many devices each process has, such as "process 0 has 4, process 1 has 2"."""
    counts = Counter(device.process_index for device in jax.devices())
    return ", ".join(f"process {index} has {count}" for index, count in sorted(counts.items()))


def check_same_number_of_devices() -> None:
    """Check that all processes have the same number of devices, which JAX's collectives assume.

    Raises:
      OvisError: The numbers differ; the error lists them.
    """
    if len({*Counter(device.process_index for device in jax.devices()).values()}) > 1:
        raise OvisError(
            f"the numbers of devices differ: {describe_devices()}; give every process the same"
            " number of devices"
        )


def _collect_reports(host: str, port: int, num_processes: int, timeout: float) -> str:
    """In process 0, wait for all reports, then send all processes an error message or ""."""
    end = time.monotonic() + timeout
    missing = set(range(1, num_processes))
    connections: list[socket.socket] = []
    error = ""
    with contextlib.ExitStack() as stack:
        # On all interfaces, like JAX's own coordinator afterwards.
        server = stack.enter_context(socket.create_server(("", port)))
        while missing and not error:
            if (remaining := end - time.monotonic()) <= 0:
                error = (
                    f"{len(missing)} of {num_processes} processes did not report within"
                    f" {timeout:g} s: {', '.join(map(str, sorted(missing)))}; start each of them"
                    f" with coordinator_address {host}:{port} and its own process_id"
                )
                break
            server.settimeout(remaining)
            try:
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(REPORT_SECONDS)
                index = int(connection.makefile().readline(20))
            except (ValueError, OSError):
                continue  # no connection, or not one of our processes
            if index not in missing:
                error = f"process_id {index} of {num_processes} is taken or out of range"
            missing.discard(index)
            connections.append(connection)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(f"{error}\n".encode())
    return error


def _report(host: str, port: int, process_id: int, timeout: float) -> str:
    """In another process, send the index to process 0, and return the error message or ""."""
    end = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host, port), timeout=timeout) as connection:
                connection.sendall(f"{process_id}\n".encode())
                # Process 0 may have started later than this process, and it has the same timeout.
                connection.settimeout(2 * timeout)
                answer = connection.makefile().readline()
            if answer:
                return answer.strip()
            raise ConnectionError("it closed the connection")
        except OSError as error:
            if time.monotonic() + RETRY_SECONDS > end:
                return (
                    f"process {process_id}: process 0 did not answer at {host}:{port} within"
                    f" {timeout:g} s ({error}); check that it runs and that this is its address"
                )
        time.sleep(RETRY_SECONDS)  # there is no notification when process 0 starts to listen
