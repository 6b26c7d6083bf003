"""Kills conversions at 20 random moments and resumes them; test_resume.py runs it as a process.

`python -m tests.conversion.kill_conversions SRC FOLDER` prints a JSON object with the counts. It
forks because starting a process takes seconds. The moments are seeded: a number of bytes written,
or a number of operations on files, before or after which the process is killed. Every other
conversion quantizes.
"""

import json
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ovis_jax.checkpoint import safetensors_reader
from ovis_jax.checkpoint.output_dirs import RESUME_FILE
from ovis_jax.conversion import tensor_chunks
from ovis_jax.conversion.from_hf import convert_from_hf
from tests.golden_copies import read_files

KILLS = 20
SHARD_BYTES = 150_000


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_operation(number: int, *, after: bool) -> None:
    """Kill this process at its n-th operation on a path."""
    count = 0

    def wrap(name: str) -> None:
        original = getattr(Path, name)

        def operation(*arguments, **options):
            nonlocal count
            count += 1
            if count == number and not after:
                kill()
            result = original(*arguments, **options)
            if count == number:
                kill()
            return result

        setattr(Path, name, operation)

    for name in ("mkdir", "open", "rename", "replace", "unlink", "write_text"):
        wrap(name)


def attempt(convert: Callable[..., object], result: Path, rng: random.Random) -> bool:
    """Convert in a fork that is killed at a random moment; return whether it finished before."""
    kill_at_bytes = rng.random() < 0.5
    share, operation, after = rng.random(), rng.randint(1, 150), rng.random() < 0.5
    child = os.fork()
    if child == 0:

        def progress(_: str, done: int, total: int) -> None:
            if kill_at_bytes and done >= share * total:
                kill()

        if not kill_at_bytes:
            kill_at_operation(operation, after=after)
        try:
            convert(result, progress=progress)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), code
    return code == 0


def identify(path: Path) -> tuple[int, int]:
    """The inode and modification time of a file, which change if it is written again."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def find_finished(partial_folder: Path) -> dict[str, tuple[int, int]]:
    """The finished shards of an unfinished result, by name."""
    record = partial_folder / RESUME_FILE
    names = json.loads(record.read_text())["finished"] if record.exists() else {}
    paths = [partial_folder / "files" / name for name in names]
    return {path.name: identify(path) for path in paths if path.exists()}


def main() -> None:
    """Convert until 20 processes have been killed; each result takes as many as it takes."""
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    warnings.simplefilter("ignore")  # JAX warns about forks; nothing here computes
    tensor_chunks.read_chunks = partial(safetensors_reader.read_chunks, size=4096)
    conversions = []
    for quantization in (None, "int4"):
        options = {"max_shard_bytes": SHARD_BYTES, "quantization": quantization}
        convert, result = partial(convert_from_hf, source, **options), folder / str(quantization)
        convert(result)
        conversions.append((convert, read_files(result)))
    rng = random.Random(0)
    counts = dict.fromkeys(("killed", "results", "equal results", "kept", "converted again"), 0)
    while counts["killed"] < KILLS:
        convert, expected = conversions[counts["results"] % 2]
        result = folder / f"result{counts['results']}"
        finished: dict[str, tuple[int, int]] = {}
        while not result.exists():
            counts["killed"] += not attempt(convert, result, rng)
            finished = find_finished(folder / f"{result.name}.partial") | finished
        counts["results"] += 1
        counts["equal results"] += read_files(result) == expected
        counts["kept"] += len(finished)
        changed = [
            name for name, identity in finished.items() if identify(result / name) != identity
        ]
        counts["converted again"] += len(changed)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
