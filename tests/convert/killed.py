"""Converts again and again, killed at random moments; run by test_resume.py in its own process.

Forking spares the seconds that every start of a process takes. `python -m tests.convert.killed SRC
FOLDER NUMBER` prints how many of the results are byte for byte that of a conversion left alone.
"""

import os
import random
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

from convert import transfer
from convert.from_hf import convert
from ovis_jax.checkpoint import journal, safetensors_files, safetensors_stream
from tests.golden_copies import read_files

SHARD_BYTES = 150_000


def attempt(source: Path, result: Path, die_at: float) -> bool:
    """Convert in a process of its own, killed when that share of the bytes is written."""
    child = os.fork()
    if child == 0:

        def progress(_: str, done: int, total: int) -> None:
            if done >= die_at * total:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            convert(source, result, max_shard_bytes=SHARD_BYTES, progress=progress)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    ended = os.waitstatus_to_exitcode(status)
    assert ended in (0, -signal.SIGKILL), ended
    return ended == 0


def damage(folder: Path, rng: random.Random) -> None:
    """What a disk may do to an unfinished folder: a bit turned, a line or a file cut short."""
    path = rng.choice([path for path in folder.iterdir() if path.stat().st_size > 100])
    if path.name == journal.JOURNAL_FILE or rng.random() < 0.5:
        first = path.read_bytes().index(b"\n") + 1 if path.suffix == ".jsonl" else 0
        os.truncate(path, rng.randint(first, path.stat().st_size))
    else:
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def main() -> None:
    """Try it NUMBER times."""
    source, folder, number = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    warnings.simplefilter("ignore")  # JAX warns of forks; nothing here computes
    safetensors_stream.MARK_BYTES = 10_000
    transfer.read_chunks = partial(safetensors_files.read_chunks, size=4096)
    convert(source, folder / "alone", max_shard_bytes=SHARD_BYTES)
    expected, equal, kept = read_files(folder / "alone"), 0, 0
    for seed in range(number):
        rng, result = random.Random(seed), folder / f"result{seed}"
        while not attempt(source, result, rng.random() * 1.5):
            assert not result.exists()
            if seed % 2:
                damage(folder / f"{result.name}.partial", rng)
            kept += journal.left_behind(result)
        equal += read_files(result) == expected
    print(equal, kept)


if __name__ == "__main__":
    main()
