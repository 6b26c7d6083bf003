"""The machine that a benchmark runs on: its cores, peak copy bandwidth and peak FLOP rate."""

import os
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from benchmarks.support.timing import time_in_turns


def _calls_per_timing() -> int:
    """Return the number of calls that are dispatched before the timer stops.

    On an accelerator, the dispatch of a single call would count.
    """
    return 1 if jax.default_backend() == "cpu" else 8


def restrict_to_cores(num_cores: int | None = None) -> int:
    """Restrict this process to its last `num_cores` cores; None keeps all. Return their number.

    XLA starts as many threads as there are cores, so call this before JAX creates an array.
    """
    if not hasattr(os, "sched_setaffinity"):
        return num_cores or os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))
    if num_cores is not None:
        if not 1 <= num_cores <= len(cores):
            raise SystemExit(f"{num_cores} threads, but this process has {len(cores)} core(s)")
        cores = cores[-num_cores:]
        os.sched_setaffinity(0, cores)
    return len(cores)


def copy_bandwidth(num_bytes: int = 2**28, repeats: int = 5) -> float:
    """Measure the bandwidth of a copy in device memory, in bytes read and written per second.

    Args:
      num_bytes: size of the array; must exceed every cache.
      repeats: number of timed copies.
    """
    x, num_calls = jnp.zeros(num_bytes // 4, jnp.float32), _calls_per_timing()
    plus_one = jax.jit(lambda x: x + 1)

    def copy_repeatedly() -> Any:
        y = x
        for _ in range(num_calls):
            y = plus_one(y)
        return y

    calls: dict[str, Callable[[], Any]] = {"jax": copy_repeatedly}
    if jax.default_backend() == "cpu":
        # The C library's copy bypasses the caches, which can be faster on one core.
        source, target = np.zeros(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
        calls["memcpy"] = lambda: [np.copyto(target, source) for _ in range(num_calls)]
    timings = time_in_turns(calls, repeats)
    seconds = min(min(t.seconds) for t in timings.values()) / num_calls
    return 2 * num_bytes / seconds


def matmul_flop_rate(
    dtype: DTypeLike, sizes: Sequence[int] | None = None, repeats: int = 3
) -> float:
    """Measure the FLOPs per second of the fastest square matrix product.

    The result has dtype float32, or int32 for integers.

    Args:
      dtype: dtype of the factors.
      sizes: numbers of rows to try; by default, some that suit the platform.
      repeats: number of timed products per size.
    """
    if sizes is None:
        sizes = (1024, 2048) if jax.default_backend() == "cpu" else (4096, 8192)
    integer = jnp.issubdtype(dtype, jnp.integer)
    out_dtype = jnp.int32 if integer else jnp.float32

    @jax.jit
    def product(x: jax.Array) -> jax.Array:
        # Float32 is multiplied exactly, as in the model.
        options = {"precision": "highest", "preferred_element_type": out_dtype}
        return jnp.einsum("ri,oi->ro", x, x, **options)

    best, num_calls = 0.0, _calls_per_timing()
    for size in sizes:
        key, shape = jax.random.key(0), (size, size)
        x = (
            jax.random.randint(key, shape, -127, 127, dtype)
            if integer
            else jax.random.normal(key, shape, dtype)
        )
        calls = {"jax": lambda x=x: [product(x) for _ in range(num_calls)]}
        seconds = min(time_in_turns(calls, repeats)["jax"].seconds) / num_calls
        best = max(best, 2 * size**3 / seconds)
    return best


def describe_machine(**extra: Any) -> dict[str, Any]:
    """Describe the devices and the host, plus extra fields."""
    return {**describe_devices(), **describe_host(), **extra}


def describe_devices() -> dict[str, Any]:
    """Describe the devices of JAX."""
    return {
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
    }


def describe_host() -> dict[str, Any]:
    """Describe the cores, the package versions and the date."""
    affinity, packages = getattr(os, "sched_getaffinity", None), _package_versions()
    names = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "libtpu")
    return {
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: packages[name] for name in names if name in packages},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def _package_versions() -> dict[str, str]:
    return {(d.metadata["Name"] or "").lower(): d.version for d in metadata.distributions()}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
