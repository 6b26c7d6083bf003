"""Results of the cases of a part, written as they come."""

import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

Status = Literal["started", "measured", "failed", "omitted"]

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")


class CaseRunner:
    """Runs the cases of a part and appends the result of each to a file of JSON lines.

    A case that fails is recorded, and the next one runs.

    Args:
      path: The file.
      part: Name of the part.
      deadline: Time by `time.monotonic()` after which no case starts.
      memory_bytes: Memory of one device; None if it is not known.
    """

    def __init__(self, path: Path, part: str, deadline: float, memory_bytes: int | None = None):
        self.path, self.part, self.deadline = path, part, deadline
        self.memory_bytes = memory_bytes

    def run(
        self,
        case: str,
        measure: Callable[[], dict[str, Any]],
        needed_bytes: int = 0,
        requires: tuple[str, ...] = (),
    ) -> dict[str, Any] | None:
        """Run a case and record its result.

        Args:
          case: Name of the case.
          measure: Returns the fields of the result.
          needed_bytes: Memory that the case needs on each device.
          requires: Packages that the case imports.

        Returns:
          The fields, or None if the case failed or was omitted.
        """
        if time.monotonic() >= self.deadline:
            return self.omit(case, "no time left")
        if self.memory_bytes is not None and needed_bytes > self.memory_bytes:
            gib = 2**30
            return self.omit(
                case,
                f"needs {needed_bytes / gib:.1f} GiB of memory, the device has "
                f"{self.memory_bytes / gib:.1f} GiB",
            )
        self._write(case, "started")
        start = time.monotonic()
        try:
            fields = measure()
            self._write(case, "measured", case_seconds=round(time.monotonic() - start, 1), **fields)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] not in requires:
                return self._fail(case, error)
            return self.omit(case, f"the package {error.name} is not installed")
        # One failure must not hide the results of other cases.
        except Exception as error:
            return self._fail(case, error)
        return fields

    def omit(self, case: str, reason: str) -> None:
        """Record that a case was not run, and why."""
        self._write(case, "omitted", reason=reason)

    def _fail(self, case: str, error: Exception) -> None:
        traceback.print_exc()  # into the log of the part
        message = str(error).strip().partition("\n")[0][:500]
        reason = f"{type(error).__name__}: {message}"
        if any(text in str(error) for text in _OUT_OF_MEMORY):
            reason = f"out of memory ({reason})"
        self._write(case, "failed", reason=reason)

    def _write(self, case: str, status: Status, **fields: Any) -> None:
        line = json.dumps({"part": self.part, "case": case, "status": status, **fields})
        with self.path.open("a") as file:
            # The line before may have been cut off.
            file.write(f"\n{line}\n" if file.tell() else f"{line}\n")
        print(line, flush=True)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read the last result of each case, in the order in which the cases started.

    A line that was cut off is skipped. A case that started and has no result counts as failed.
    """
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            result = json.loads(line)
        except ValueError:  # its process was killed while it wrote
            continue
        if result["status"] == "started":
            result |= {"status": "failed", "reason": "the process ended during this case"}
        results[result["part"], result["case"]] = result
    return list(results.values())


def collect_facts(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields of all measured cases of the part "facts"."""
    measured = (x for x in results if x["part"] == "facts" and x["status"] == "measured")
    return {k: v for x in measured for k, v in x.items() if k not in ("part", "case", "status")}
