"""Starting several processes: a roll call, then `jax.distributed.initialize`.

When `jax.distributed.initialize` times out, JAX aborts the process without naming the missing ones.
So all processes first report to the coordinator's address. If one is missing, every process raises
an ordinary error that names it.
"""

import contextlib
import socket
import time

import jax

from ovis_jax.errors import OvisError

RETRY_SECONDS = 0.1
"""Pause between two attempts to reach the coordinator."""
REPORT_SECONDS = 5.0
"""Time in which a connected process must send its index."""


def initialize_distributed(
    coordinator_address: str, num_processes: int, process_id: int, *, timeout: float = 300.0
) -> None:
    """Make this process one of several that share their devices.

    Call it before JAX creates any array. Afterwards `jax.devices()` lists the devices of all
    processes. Every process must then build the same mesh and call `load`, `generate` and the other
    functions with the same arguments.

    Args:
      coordinator_address: "host:port" of process 0, the same for all processes.
      num_processes: number of processes.
      process_id: index of this process, from 0.
      timeout: seconds to wait for the other processes.

    Raises:
      OvisError: the address or the index is invalid, two processes have the same index, or some
        processes did not report in time; names those that are missing.
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
    )


def _collect_reports(host: str, port: int, num_processes: int, timeout: float) -> str:
    """In process 0: wait for all reports, then send every process the error, "" for none."""
    end = time.monotonic() + timeout
    indices: set[int] = set()
    connections: list[socket.socket] = []
    error = ""
    with contextlib.ExitStack() as stack:
        try:
            # On all interfaces, like JAX's own coordinator afterwards.
            server = stack.enter_context(socket.create_server(("", port)))
        except OSError as refusal:
            return f"process 0 cannot listen on port {port}: {refusal}"
        while len(indices) < num_processes - 1 and not error:
            server.settimeout(max(end - time.monotonic(), 0.001))
            try:
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(REPORT_SECONDS)
                index = int(connection.makefile().readline(20))
            except TimeoutError:
                if time.monotonic() < end:
                    continue  # a connection that sent nothing
                missing = sorted(set(range(1, num_processes)) - indices)
                error = (
                    f"{len(missing)} of {num_processes} processes did not report within"
                    f" {timeout:g} s: {', '.join(map(str, missing))}; start each of them with"
                    f" coordinator_address {host}:{port} and its own process_id"
                )
            except (ValueError, OSError):
                continue  # not one of our processes
            else:
                if index in indices or not 0 < index < num_processes:
                    error = f"process_id {index} of {num_processes} is taken or out of range"
                indices.add(index)
                connections.append(connection)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(f"{error}\n".encode())
                # The side that closes first keeps the port busy, so let it be the other side.
                connection.recv(1)
    return error


def _report(host: str, port: int, process_id: int, timeout: float) -> str:
    """In the other processes: send the index to process 0, and return the error it answers with."""
    end = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host, port), timeout=timeout) as connection:
                connection.sendall(f"{process_id}\n".encode())
                # Process 0 may have started later than this process and waits equally long.
                connection.settimeout(2 * timeout)
                answer = connection.makefile().readline()
            if answer:
                return answer.strip()
            reason = "it closed the connection"
        except OSError as error:
            reason = str(error)
        if time.monotonic() + RETRY_SECONDS > end:
            return (
                f"process {process_id}: process 0 did not answer at {host}:{port} within"
                f" {timeout:g} s ({reason}); check that it runs and that this is its address"
            )
        time.sleep(RETRY_SECONDS)
