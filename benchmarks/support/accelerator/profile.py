"""Which kernels take the time of a decode step and of a prompt?"""

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.support.accelerator.random_model import param_bytes_per_device
from benchmarks.support.accelerator.results import CaseRunner
from benchmarks.support.accelerator.settings import Settings
from benchmarks.support.accelerator.speed import PreparedStage, SpeedMeasurements

MAX_TRACE_BYTES = 16 * 10**6
NUM_KERNELS = 10


def run(settings: Settings, cases: CaseRunner) -> None:
    """Run the part."""
    speed, sizes = SpeedMeasurements(settings), settings.sizes
    weights = param_bytes_per_device(sizes.config)
    stages: dict[str, Callable[[], PreparedStage]] = {
        "decode": lambda: speed.prepare_decode(sizes.decode_rows[0]),
        "prefill": lambda: speed.prepare_prefill(sizes.prompt_lengths[0]),
    }
    for name, prepare in stages.items():
        path = settings.out / f"trace_{name}.xplane.pb"
        cases.run(name, lambda prepare=prepare, path=path: profile(prepare(), path), weights)


def profile(stage: PreparedStage, path: Path) -> dict[str, Any]:
    """Trace one step of a stage.

    Args:
      stage: The stage.
      path: File to write the trace to, unless it exceeds MAX_TRACE_BYTES.

    Returns:
      The kernels that take the most time, with their share of the time of all kernels.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.block_until_ready(stage.call())
    with tempfile.TemporaryDirectory() as temporary:
        with jax.profiler.trace(temporary, profiler_options=options):
            jax.block_until_ready(stage.step())
        (trace,) = Path(temporary).rglob("*.xplane.pb")
        seconds = kernel_seconds(trace)
        kept = trace.stat().st_size <= MAX_TRACE_BYTES
        if kept:
            shutil.copyfile(trace, path)
    if not seconds:
        raise RuntimeError("the trace has no kernels")
    total = sum(seconds.values())
    return {
        "kernel_seconds": total,
        "trace": path.name if kept else f"not kept: more than {MAX_TRACE_BYTES} bytes",
        "largest": [
            {"kernel": name, "seconds": time, "share": time / total}
            for name, time in seconds.most_common(NUM_KERNELS)
        ],
    }


def kernel_seconds(trace: Path) -> Counter[str]:
    """Sum the seconds of each kernel in a trace of JAX's profiler, over all devices.

    On GPUs and TPUs these are the events of the devices; on a CPU, the operations of XLA's threads.
    Kernels whose names differ only in a number count as one.
    """
    lines = [
        (plane.name.startswith("/device:"), line)
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
    ]
    on_device = [x for device, x in lines if device and x.name.startswith(("Stream", "XLA Ops"))]
    events = [event for line in on_device for event in line.events] or [
        event for _, line in lines for event in line.events if is_xla_operation_on_cpu(event)
    ]
    seconds: Counter[str] = Counter()
    for event in events:
        seconds[re.sub(r"[._]\d+\b", "", event.name)] += event.duration_ns * 1e-9
    return seconds


def is_xla_operation_on_cpu(event: Any) -> bool:
    """Whether an event of a CPU thread is an operation of a compiled program."""
    return any(name == "hlo_op" for name, _ in event.stats)
