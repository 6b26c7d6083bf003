"""What the device is, and how fast it copies and multiplies."""

import importlib.util
import shutil
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.support.accelerator.results import CaseRunner
from benchmarks.support.accelerator.settings import Settings
from benchmarks.support.machine_peaks import (
    copy_bandwidth,
    describe_machine,
    matmul_flop_rate,
)
from benchmarks.support.timing import time_in_turns

OPTIONAL_PACKAGES = ("tokamax", "torch", "transformers", "pydantic", "matplotlib", "typer")


def run(settings: Settings, cases: CaseRunner) -> None:
    """Run the part."""
    sizes = settings.sizes
    cases.run("device", lambda: describe_device(settings))
    cases.run("copy", lambda: {"copy_bytes_per_second": copy_bandwidth(sizes.copy_bytes)})
    for dtype in (jnp.bfloat16, jnp.float32):
        name = jnp.dtype(dtype).name
        cases.run(
            f"matrix product, {name}",
            lambda dtype=dtype, name=name: {
                f"flops_{name}": matmul_flop_rate(dtype, sizes.product_sizes)
            },
        )
    cases.run("matrix product, int8", lambda: {"ops_int8": int8_rate(sizes.product_sizes)})


def describe_device(settings: Settings) -> dict[str, Any]:
    """Describe the devices, their memory, the packages and the free disk space."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return describe_machine(
        memory_bytes=stats.get("bytes_limit"),
        free_disk_bytes=shutil.disk_usage(settings.out).free,
        missing_packages=[x for x in OPTIONAL_PACKAGES if importlib.util.find_spec(x) is None],
    )


def int8_rate(sizes: tuple[int, ...]) -> float:
    """Measure the int8 operations per second of the fastest square product with an int32 result."""
    product = jax.jit(lambda x: jnp.einsum("ri,oi->ro", x, x, preferred_element_type=jnp.int32))
    best = 0.0
    for size in sizes:
        x = jax.random.randint(jax.random.key(0), (size, size), -127, 127, jnp.int8)
        timings = time_in_turns({"jax": lambda x=x: product(x)}, repeats=3)["jax"]
        best = max(best, 2 * size**3 / min(timings.seconds))
    return best
