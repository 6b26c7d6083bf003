"""Runs a part of the accelerator check in a process of its own, with a time limit.

A part that hangs, crashes or runs out of memory therefore cannot take the others with it, and
leaves the device free for the next one.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.support.accelerator.results import CaseRunner
from benchmarks.support.accelerator.settings import Settings

ROOT = Path(__file__).parents[3]
GRACE_SECONDS = 15.0
"""Seconds after its limit at which a part is killed; it starts no case after its limit."""


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
      name: Name of the part.
      title: Heading of the part in the report.
      module: Module whose function `run(settings, cases)` runs the part.
      seconds: Time limit.
      environment: Environment variables of its process.
    """

    name: str
    title: str
    module: str
    seconds: float
    environment: tuple[tuple[str, str], ...] = ()


def run_part(
    part: Part, settings: Settings, temporary: Path, grace_seconds: float = GRACE_SECONDS
) -> dict[str, Any]:
    """Run a part and wait for its end.

    Args:
      part: The part.
      settings: Its settings.
      temporary: Folder for the settings file and the compilation cache.
      grace_seconds: Seconds after the time limit at which the process is killed.

    Returns:
      "part", "status" ("finished", "crashed" or "timed out"), "exit_code" and "seconds".
      The results of its cases are in `results.jsonl`, its output in `log.txt`.
    """
    path = temporary / f"{part.name}.json"
    settings.write(path)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "JAX_COMPILATION_CACHE_DIR": str(temporary / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "HF_HUB_OFFLINE": "1",
        **dict(part.environment),
    }
    if settings.rehearse:
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiles faster
    start = time.monotonic()
    with (settings.out / "log.txt").open("ab") as log:
        log.write(f"--- {part.name}\n".encode())
        log.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, part.module, str(path)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that its own processes can be killed with it
        )
        try:
            code = process.wait(part.seconds + grace_seconds)
            status = "finished" if code == 0 else "crashed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        if hasattr(os, "killpg"):
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        else:
            process.kill()
        code = process.wait()
    seconds = round(time.monotonic() - start, 1)
    return {"part": part.name, "status": status, "exit_code": code, "seconds": seconds}


def main(module: str, settings_path: str) -> None:
    """Run a part; this is what its process calls."""
    start = time.monotonic()
    settings = Settings.read(Path(settings_path))
    cases = CaseRunner(
        settings.out / "results.jsonl",
        settings.part,
        start + settings.seconds,
        settings.facts.get("memory_bytes"),
    )
    import_module(module).run(settings, cases)


if __name__ == "__main__":
    main(*sys.argv[1:])
