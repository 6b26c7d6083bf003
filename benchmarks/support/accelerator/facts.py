"""What the device is, and how fast it copies and multiplies."""

import importlib.util
import shutil
from typing import Any

import jax

from benchmarks.support.accelerator.results import CaseRunner
from benchmarks.support.accelerator.settings import Settings
from benchmarks.support.machine_peaks import (
    copy_bandwidth,
    describe_devices,
    describe_host,
    matmul_flop_rate,
)

OPTIONAL_PACKAGES = ("tokamax", "torch", "transformers", "pydantic", "matplotlib", "typer")


def run(settings: Settings, cases: CaseRunner) -> None:
    """Run the part."""
    sizes = settings.sizes
    cases.run("devices", describe_devices_and_memory)
    cases.run("host", lambda: describe_host_and_packages(settings))
    cases.run("copy", lambda: {"copy_bytes_per_second": copy_bandwidth(sizes.copy_bytes)})
    for dtype in ("bfloat16", "int8", "float32"):
        cases.run(
            f"matrix product, {dtype}",
            lambda dtype=dtype: {f"flops_{dtype}": matmul_flop_rate(dtype, sizes.product_sizes)},
        )


def describe_devices_and_memory() -> dict[str, Any]:
    """Describe the devices, and the memory of each that JAX may use."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {**describe_devices(), "memory_bytes": stats.get("bytes_limit")}


def describe_host_and_packages(settings: Settings) -> dict[str, Any]:
    """Describe the host, the packages and the free disk space."""
    return {
        **describe_host(),
        "free_disk_bytes": shutil.disk_usage(settings.out).free,
        "missing_packages": [x for x in OPTIONAL_PACKAGES if importlib.util.find_spec(x) is None],
    }
