"""How fast is conversion compared with copying the folder? `python -m benchmarks.conversion SRC`.

The benchmark measures `cp -r`, `convert` with and without checksums, a conversion that is killed
halfway and resumed, and the export of its result. The export must have the source's tensors. The
benchmark prints the peak resident memory of each process, which includes mapped pages. The disk
needs room for two more copies of the source.
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

from benchmarks.support.results import JsonOption, print_results, write_results
from ovis_jax.checkpoint.key_map import UNUSED_HUB_KEYS
from ovis_jax.checkpoint.safetensors_reader import map_file, view_tensor
from ovis_jax.checkpoint.tensor_index import read_tensor_index

ROOT = Path(__file__).parents[1]


def drop_from_page_cache(folder: Path) -> None:
    """Drop the files of a folder from memory and finish all writes to disk.

    Otherwise the speed of a command depends on what the one before it left in memory.
    """
    os.sync()
    if hasattr(os, "posix_fadvise"):
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_command(command: list[str]) -> dict[str, float]:
    """Return the seconds and the peak resident bytes of a command that must succeed.

    The peak is at least that of this process, which starts the command.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return {"seconds": time.perf_counter() - start, "peak_bytes": usage.ru_maxrss * 1024}


def run_until_killed(command: list[str], result: Path, at_bytes: int) -> float:
    """Kill a command when its unfinished result has a size, and return the seconds until then."""
    partial = result.with_name(f"{result.name}.partial")
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        paths = list(partial.rglob("*.safetensors*"))
        if sum(path.stat().st_size for path in paths if path.exists()) >= at_bytes:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.001)  # a conversion does not report how much it has written
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"{' '.join(command)}: ended before it could be killed")
    return time.perf_counter() - start


def find_differing_tensors(source: Path, exported: Path) -> list[str]:
    """Return the keys of tensors that are not bit-equal in two folders of the Hub's layout.

    The tensors that the model never uses can be zeros in the exported folder.
    """
    left, right = ({x.key: x for x in read_tensor_index(p).tensors} for p in (source, exported))
    differing = [*(left.keys() ^ right.keys())]
    for key in left.keys() & right.keys():
        a, b = (view_tensor(map_file(x.path), x).view(np.uint16) for x in (left[key], right[key]))
        equal = a.shape == b.shape and np.array_equal(a, b)
        if not equal and not (key in UNUSED_HUB_KEYS and not b.any()):
            differing.append(key)
    return differing


def main(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder in the Hub's layout, in bfloat16.")
    ],
    folder: Annotated[
        Path | None, typer.Option(help="Folder for temporary results; default: system folder.")
    ] = None,
    output: JsonOption = None,
) -> None:
    """Measure the time and memory of converting a checkpoint."""
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
                drop_from_page_cache(source)
                rows[f"{name}, {turn}"] = measure_command(command)
                shutil.rmtree(result)
        drop_from_page_cache(source)
        seconds = run_until_killed(convert(), own, total // 2)
        rows["from_hf, killed half-way"] = {"seconds": seconds}
        rows["from_hf, resumed"] = measure_command(convert())
        result_bytes = sum(path.stat().st_size for path in own.iterdir())
        rows["to_hf"] = measure_command([*python, "convert.to_hf", str(own), str(back)])
        shutil.rmtree(own)
        differing = find_differing_tensors(source, back)
    for row in rows.values():
        row["bytes_per_second"] = total / row["seconds"]
    copy_seconds, convert_seconds = (
        min(rows[f"{name}, {turn}"]["seconds"] for turn in ("first", "second"))
        for name in ("cp -r", "from_hf")
    )
    resumed = sum(rows[f"from_hf, {name}"]["seconds"] for name in ("killed half-way", "resumed"))
    facts = {
        "source_bytes": total,
        "result_bytes": result_bytes,
        "speed_relative_to_cp": copy_seconds / convert_seconds,
        "resume_overhead_seconds": resumed - convert_seconds,
        "differing_tensors": differing,
    }
    print_results(
        f"{source.name}: {total / 1e9:.2f} GB",
        ["", "seconds", "GB/s", "speed / cp", "peak MiB"],
        [
            [
                name,
                f"{row['seconds']:.1f}",
                f"{row['bytes_per_second'] / 1e9:.2f}",
                f"{copy_seconds / row['seconds']:.2f}",
                f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else "",
            ]
            for name, row in rows.items()
        ],
    )
    write_results(output, facts, rows=[{"name": name, **row} for name, row in rows.items()])
    if differing:
        raise SystemExit(f"tensors that differ after export: {', '.join(sorted(differing))}")


if __name__ == "__main__":
    typer.run(main)
