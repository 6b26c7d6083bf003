"""Agreement between processes: all continue with the same values, or all raise an error.

If one process raised an error while the others continued, the others would wait for it in their
next collective operation. If the processes ran programs with different shapes, all would wait.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from ovis_jax.errors import OvisError

MAX_TEXT_BYTES = 1024
"""Maximum length of what a process reports; the rest of a longer error message is cut off."""

_AGREED = "All processes have received this error."
_ERROR = "error: "


@contextmanager
def agree(subject: str) -> Iterator[dict[str, str]]:
    """Check at the end of the block that no process failed, and that all have the same values.

    All processes must enter the block at the same point of their program, and the block must not
    contain other collective operations. With one process, nothing is checked.

    Args:
      subject: What the values belong to, for the error message, such as "step 12".

    Yields:
      A dict to which the block adds short descriptions by name, such as checksums. They must be
      equal in all processes.

    Raises:
      OvisError: The block raised an `OvisError` or `OSError` in another process, or the values
        differ. The error names the processes.
    """
    values: dict[str, str] = {}
    try:
        yield values
    except (OvisError, OSError) as error:
        if _has_several_processes():
            _gather_texts(f"{_ERROR}{error}")
            error.add_note(_AGREED)
        raise
    if not _has_several_processes():
        return
    texts = _gather_texts("\n".join(f"{name} {value}" for name, value in values.items()))
    errors = {i: text for i, text in enumerate(texts) if text.startswith(_ERROR)}
    if errors:
        lines = (f"process {i}: {text.removeprefix(_ERROR)}" for i, text in errors.items())
        problem = "; ".join(lines)
    elif len({*texts}) > 1:
        problem = f"{subject}: {_describe_differences(texts)}"
    else:
        return
    error = OvisError(problem)
    error.add_note(_AGREED)
    raise error


def checksum(parts: Iterable[bytes]) -> str:
    """Return a short checksum for the values of `agree`."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _has_several_processes() -> bool:
    """Return whether this process has joined others; with a single one, JAX is not started."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_agreed(error: BaseException) -> bool:
    """Return whether `agree` has raised an error in every process, not only in this one."""
    return _AGREED in getattr(error, "__notes__", ())


def _gather_texts(text: str) -> list[str]:
    """Return the texts of all processes, by process index."""
    data = np.frombuffer(text.encode()[:MAX_TEXT_BYTES], np.uint8)
    padded = np.pad(data, (0, MAX_TEXT_BYTES - len(data)))
    rows = multihost_utils.process_allgather(padded)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def _describe_differences(texts: list[str]) -> str:
    """Return the values that differ, each with the processes that have it."""
    processes: dict[str, list[str]] = {}
    for index, text in enumerate(texts):
        for line in text.splitlines():
            processes.setdefault(line, []).append(str(index))
    differing = {line: group for line, group in processes.items() if len(group) < len(texts)}
    lines = (f"{line} in process {', '.join(group)}" for line, group in sorted(differing.items()))
    return f"{'; '.join(lines)}. All processes need the same files, config and versions"
