"""What benchmarks share: timing in turns, what the machine can do at best, tables, JSON and plots.

Times are of one machine in one minute, and other work moves them. So what is to be compared runs in
turn, round by round, and is told as a median with its spread.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from rich.console import Console
from rich.table import Column, Table


@dataclass(frozen=True)
class Times:
    """Seconds of one call, repeat by repeat."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """The median, the fastest and the slowest repeat, and how many there were."""
        return {
            "median": self.median,
            "fastest": min(self.seconds),
            "slowest": max(self.seconds),
            "repeats": len(self.seconds),
        }

    def text(self, unit: float = 1e3) -> str:
        """Median and spread, in milliseconds unless `unit` (of a second) says otherwise."""
        return spread(self.to_json(), unit)


def spread(times: Mapping[str, Any], unit: float = 1e3) -> str:
    """What `Times.to_json` gave as `Times.text` says it."""
    low, middle, high = (times[key] * unit for key in ("fastest", "median", "slowest"))
    return f"{middle:.4g} ({low:.4g} - {high:.4g})"


def alternate(
    calls: Mapping[str, Callable[[], Any]], repeats: int, warm: int = 1
) -> dict[str, Times]:
    """Time several calls in turn, `repeats` times each, after `warm` rounds that do not count.

    A call is over when the JAX arrays that it returned are there. Every other round runs backwards,
    so that none always follows the same one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm + repeats):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            took = time.perf_counter() - start
            if number >= warm:
                seconds[name].append(took)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def pin(threads: int | None = None) -> int:
    """Keep this process to its last `threads` cores (None: to all that it has); gives how many.

    XLA takes as many threads as it finds cores, so call it before JAX makes its first array.
    """
    if not hasattr(os, "sched_setaffinity"):
        return threads or os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))
    if threads is not None:
        if not 1 <= threads <= len(cores):
            raise SystemExit(f"{threads} threads, but this process has {len(cores)} core(s)")
        cores = cores[-threads:]
        os.sched_setaffinity(0, cores)
    return len(cores)


def copy_bandwidth(size: int = 2**28, repeats: int = 5) -> float:
    """Bytes a second that the device's memory moves in a copy, those read and those written.

    `size` is in bytes and has to be larger than every cache.
    """
    x = jnp.zeros(size // 4, jnp.float32)
    plus_one = jax.jit(lambda x: x + 1)
    calls: dict[str, Callable[[], Any]] = {"jax": lambda: plus_one(x)}
    if jax.default_backend() == "cpu":
        # The C library's copy writes past the caches, which one core may do faster.
        source, target = np.zeros(size, np.uint8), np.ones(size, np.uint8)
        calls["memcpy"] = lambda: np.copyto(target, source)
    times = alternate(calls, repeats)
    return 2 * size / min(min(t.seconds) for t in times.values())


def matmul_rate(dtype: DTypeLike, sizes: Sequence[int] | None = None, repeats: int = 3) -> float:
    """FLOP a second of the fastest square matrix product in `dtype`, with a float32 result.

    `sizes` are the sides tried; None for some that suit the platform.
    """
    if sizes is None:
        sizes = (1024, 2048) if jax.default_backend() == "cpu" else (4096, 8192)
    product = jax.jit(lambda x: jnp.einsum("ri,oi->ro", x, x, preferred_element_type=jnp.float32))
    best = 0.0
    for side in sizes:
        x = jax.random.normal(jax.random.key(0), (side, side), dtype)
        times = alternate({"jax": lambda x=x: product(x)}, repeats)["jax"]
        best = max(best, 2 * side**3 / min(times.seconds))
    return best


def nbytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes, in a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def machine(**more: Any) -> dict[str, Any]:
    """What a figure is worth nothing without: device, cores, versions, date, and what is given."""
    affinity = getattr(os, "sched_getaffinity", None)
    packages = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    names = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "libtpu")
    return {
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: packages[name] for name in names if name in packages},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows; the first column is text, the others are flushed right."""
    table = Table(
        *(Column(name, justify="right" if n else "left") for n, name in enumerate(columns)),
        title=title,
        title_justify="left",
    )
    for row in rows:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row))
    Console().print(table)


def write_json(path: Path, **content: Any) -> None:
    """Write what was found; `machine=machine()` belongs into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def plot(
    path: Path,
    title: str,
    labels: Sequence[Any],
    series: Mapping[str, Sequence[float]],
    unit: str,
    *,
    lines: bool = False,
    level: float | None = None,
) -> None:
    """Draw one bar (or with `lines` one point) a label and series; a dashed line at `level`."""
    # Not there unless the extra `train` is installed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 0.5 * len(labels) * max(1, len(series) / 2)), 4.5))
    axes = figure.subplots()
    places, width = np.arange(len(labels)), 0.8 / max(1, len(series))
    for number, (name, values) in enumerate(series.items()):
        if lines:
            axes.plot(labels, values, marker="o", label=name)
        else:
            axes.bar(places + (number + 0.5) * width - 0.4, values, width, label=name)
    if not lines:
        axes.set_xticks(places, [str(label) for label in labels], rotation=30, ha="right")
    if level is not None:
        axes.axhline(level, color="black", linestyle="--", linewidth=1)
    axes.set(title=title, ylabel=unit)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
