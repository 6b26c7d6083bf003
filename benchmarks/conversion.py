"""How a conversion compares with copying the same folder: `python -m benchmarks.conversion SRC`.

In turn `cp -r`, `convert.from_hf` with and without checksums, a conversion that is killed half-way
and goes on, and from that the way back, which must give the source's tensors again. Each process's
peak of resident memory is told (mapped pages count). There must be room for the source twice.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.measure import machine, print_table, write_json
from ovis_jax.checkpoint.folder import open_checkpoint
from ovis_jax.checkpoint.journal import left_behind
from ovis_jax.checkpoint.keymap import UNUSED
from ovis_jax.checkpoint.safetensors_files import map_file, view_tensor

ROOT = Path(__file__).parents[1]


def cool(folder: Path) -> None:
    """Leave the files of a folder on the disk alone, and nothing for it to write.

    Otherwise a command is as fast as what ran before it happens to have left in memory.
    """
    os.sync()
    if hasattr(os, "posix_fadvise"):
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(command: list[str]) -> dict[str, float]:
    """Seconds and peak resident bytes of a command that must succeed.

    The peak is at least that of this process, out of which the command is started.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return {"seconds": time.perf_counter() - began, "peak_bytes": usage.ru_maxrss * 1024}


def run_killed(command: list[str], result: Path, at_bytes: int) -> float:
    """Start a command and kill it once its unfinished result is that large; the seconds until."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if left_behind(result) >= at_bytes:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.001)
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"{' '.join(command)}: ended before it could be killed")
    return time.perf_counter() - began


def differing(one: Path, other: Path) -> list[str]:
    """Keys of tensors that are not the same bits in two folders of the Hub's layout.

    The tensors that the model never uses may be zeros in `other`.
    """
    left, right = ({x.key: x for x in open_checkpoint(p).tensors} for p in (one, other))
    found = [*(left.keys() ^ right.keys())]
    for key in left.keys() & right.keys():
        a, b = (view_tensor(map_file(x.path), x).view(np.uint16) for x in (left[key], right[key]))
        same = a.shape == b.shape and np.array_equal(a, b)
        if not same and not (key in UNUSED and not b.any()):
            found.append(key)
    return found


def main(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="In the Hub's layout, bfloat16.")],
    folder: Annotated[Path | None, typer.Option(help="Where results go; a temporary one.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
) -> None:
    """Measure conversions of a checkpoint."""
    source = source.resolve()
    total = sum(path.stat().st_size for path in source.iterdir())
    python = [sys.executable, "-m"]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        copy, own, back = (Path(temporary) / name for name in ("copy", "own", "back"))

        def convert(*options: str) -> list[str]:
            return [*python, "convert.from_hf", str(source), str(own), *options]

        for turn in ("first", "second"):
            for name, command, result in (
                ("cp -r", ["cp", "-r", str(source), str(copy)], copy),
                ("from_hf", convert(), own),
                ("from_hf --no-checksums", convert("--no-checksums"), own),
            ):
                cool(source)
                rows[f"{name}, {turn}"] = run(command)
                shutil.rmtree(result)
        cool(source)
        half = run_killed(convert(), own, total // 2)
        rows["from_hf, killed half-way"] = {"seconds": half}
        rows["from_hf, going on"] = run(convert())
        result_bytes = sum(path.stat().st_size for path in own.iterdir())
        rows["to_hf"] = run([*python, "convert.to_hf", str(own), str(back)])
        shutil.rmtree(own)
        wrong = differing(source, back)
    for row in rows.values():
        row["bytes_per_second"] = total / row["seconds"]
    plain, whole = (
        min(rows[f"{name}, {turn}"]["seconds"] for turn in ("first", "second"))
        for name in ("cp -r", "from_hf")
    )
    resumed = sum(rows[f"from_hf, {name}"]["seconds"] for name in ("killed half-way", "going on"))
    facts = {
        "source_bytes": total,
        "result_bytes": result_bytes,
        "of_the_speed_of_cp": plain / whole,
        "resume_overhead_seconds": resumed - whole,
        "tensors_that_differ": wrong,
    }
    print_table(
        f"{source.name}: {total / 1e9:.2f} GB",
        ["", "seconds", "GB/s", "of cp", "peak MiB"],
        [
            [
                name,
                f"{row['seconds']:.1f}",
                f"{row['bytes_per_second'] / 1e9:.2f}",
                f"{plain / row['seconds']:.2f}",
                f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "",
            ]
            for name, row in rows.items()
        ],
    )
    if output is not None:
        write_json(
            output, machine=machine(**facts), rows=[{"name": n, **r} for n, r in rows.items()]
        )
    if wrong:
        raise SystemExit(f"there and back differ: {', '.join(sorted(wrong))}")


if __name__ == "__main__":
    typer.run(main)
