"""Several processes as one: a roll call, then `jax.distributed`.

`jax.distributed.initialize` ends a process that waits in vain without a word about whom it waited
for. So everybody first reports at the coordinator's address, and a start that cannot succeed is an
ordinary error that names who is missing.
"""

import contextlib
import json
import socket
import time

import jax

from ovis_jax.errors import OvisError

PAUSE = 0.1
"""Seconds between two attempts to reach the coordinator."""
PATIENCE = 5.0
"""Seconds for a caller to say who it is."""


def start_processes(address: str, count: int, index: int, *, timeout: float = 300.0) -> None:
    """Make this process one of `count` that share their devices; call it before any array is made.

    Afterwards `jax.devices()` holds the devices of all processes. Every process then builds the
    same mesh, and calls `load` and `generate` with the same arguments.

    Args:
      address: "host:port" of process 0, the same everywhere.
      count: how many processes there are.
      index: of this process, from 0.
      timeout: seconds to wait for the others.

    Raises:
      OvisError: the address or the index is not possible, an index is there twice, or not all
        processes have reported in time; names those that are missing.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise OvisError(f"address is {address!r}, expected host:port of process 0")
    if not 0 <= index < count:
        raise OvisError(f"index is {index}, expected 0 to {count - 1} for {count} processes")
    if index == 0:
        _call_the_roll(host, int(port), count, timeout)
    else:
        _report(host, int(port), index, timeout)
    jax.distributed.initialize(address, count, index, initialization_timeout=max(int(timeout), 1))


def _call_the_roll(host: str, port: int, count: int, timeout: float) -> None:
    """As process 0: wait until everybody has reported, and tell all who did how it went."""
    end = time.monotonic() + timeout
    here: set[int] = set()
    callers: list[socket.socket] = []
    with contextlib.ExitStack() as opened:
        try:
            # At every interface, as JAX does after it.
            server = opened.enter_context(socket.create_server(("", port)))
        except OSError as error:
            raise OvisError(f"process 0 cannot listen at port {port}: {error}") from error
        fault = ""
        while len(here) < count - 1 and not fault:
            server.settimeout(max(end - time.monotonic(), 0.001))
            try:
                caller, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, count)) - here)
                fault = (
                    f"after {timeout:g} s {len(missing)} of {count} processes are missing:"
                    f" {', '.join(map(str, missing))}; start each with the address {host}:{port}"
                    " and an index of its own"
                )
                continue
            opened.enter_context(caller)
            caller.settimeout(PATIENCE)
            try:
                said = int(caller.makefile().readline(20))
            except (ValueError, OSError):
                continue  # somebody else who knocked at this port
            if said in here or not 0 < said < count:
                fault = f"a process reported as {said} of {count}, which is taken or out of range"
            here.add(said)
            callers.append(caller)
        for caller in callers:
            with contextlib.suppress(OSError):
                caller.sendall(f"{json.dumps(fault)}\n".encode())
                # Whoever closes first keeps the port busy for a while: let it be the caller.
                caller.recv(1)
    if fault:
        raise OvisError(fault)


def _report(host: str, port: int, index: int, timeout: float) -> None:
    """As any other process: reach process 0 and hear how the roll call went."""
    end = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host, port), timeout=timeout) as call:
                call.sendall(f"{index}\n".encode())
                # Process 0 may have begun later than this one, and waits just as long.
                call.settimeout(2 * timeout)
                answer = call.makefile().readline()
            if answer:
                break
            why = "it hung up"
        except OSError as error:
            why = str(error)
        if time.monotonic() + PAUSE > end:
            raise OvisError(
                f"process {index}: process 0 did not answer at {host}:{port} within {timeout:g} s"
                f" ({why}); is it running, and is this its address?"
            )
        time.sleep(PAUSE)
    if fault := json.loads(answer):
        raise OvisError(fault)
