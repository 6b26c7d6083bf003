"""The plan for a workload: the memory it needs, whether it fits, and lower bounds on latency."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

from ovis_jax.errors import OvisError, install_command
from ovis_jax.plan import aot_compile
from ovis_jax.plan.latency_bounds import all_reduces_per_decode_step, latency_bounds
from ovis_jax.plan.memory_estimate import MemoryEstimate, estimate_memory, usable_bytes
from ovis_jax.plan.suggestions import smallest_fitting_change
from ovis_jax.plan.topologies import Topology
from ovis_jax.plan.workload import Workload

Method = Literal["auto", "compiler", "arithmetic"]
"""The source of the figures. "auto" uses the platform's compiler if it is installed."""


def make_plan(
    workload: Workload,
    method: Method = "auto",
    notify: Callable[[str], None] = print,
    programs: Sequence[aot_compile.Program] = aot_compile.REQUEST_PROGRAMS,
) -> dict[str, Any]:
    """Compute the memory on one device, whether the workload fits, and lower bounds on latency.

    Args:
      workload: The workload.
      method: The source of the figures.
      notify: Called with a message before each compilation.
      programs: Programs to compile.

    Returns:
      A JSON-serializable dictionary; sizes are bytes on one device, times are seconds.

    Raises:
      OvisError: The workload is invalid (see `Workload.validate`), or `method` is "compiler" but
        the compiler is not installed or cannot compile for the workload.
    """
    workload.validate()
    memory = estimate_memory(workload)
    source, compiled = compile_programs(
        workload.topology,
        {name: partial(aot_compile.analyze_program, workload, name) for name in programs},
        memory.peak - memory.activations > usable_bytes(workload.topology),
        method,
        notify,
    )
    activations, peak = memory.activations, memory.peak
    succeeded = [program for program in compiled.values() if "error" not in program]
    if succeeded:
        activations = max(program["temp"] for program in succeeded)
    if compiled:
        peak = max(
            _peak_with_unread_weights(workload, memory, name, program)
            for name, program in compiled.items()
        )
    usable = usable_bytes(workload.topology)
    over_by = max(peak - usable, 0)
    compiler_errors = [program["error"] for program in compiled.values() if "error" in program]
    plan = {
        "topology": workload.topology.name,
        "devices": workload.topology.num_devices,
        "mesh": workload.mesh_sizes._asdict(),
        "batch": workload.batch_size,
        "max_length": workload.max_length,
        "crops": workload.num_crops,
        "dtype": workload.dtype,
        "quantization": workload.quantization,
        "kv_cache_dtype": workload.kv_cache_dtype,
        "source": source,
        "notes": _notes(workload),
        "weights": memory.weights,
        "bytes": {
            "weights": sum(memory.weights.values()),
            "cache": memory.cache,
            "activations": activations,
            "peak": peak,
            "usable": usable,
            "memory": workload.topology.device.memory_bytes,
        },
        "arithmetic": {
            "decode_arguments": memory.weights["decoder"] + memory.cache,
            "decode_temp": memory.decode_temp,
            "prefill_temp": memory.prefill_temp,
            "peak": memory.peak,
            "all_reduces_per_block": min(all_reduces_per_decode_step(workload), 2),
        },
        "programs": compiled,
        "latency_bounds": asdict(latency_bounds(workload, memory)),
        "fits": not over_by and not compiler_errors,
        "over_by": over_by,
        "compiler_errors": compiler_errors,
        "change": None,
    }
    if not plan["fits"]:
        change = smallest_fitting_change(workload, max(peak - memory.peak, 0))
        if change is not None:
            plan["change"] = {"options": change[0], "peak": estimate_memory(change[1]).peak}
    return plan


def compile_programs(
    topology: Topology,
    programs: Mapping[str, Callable[[], dict[str, Any]]],
    is_certainly_too_large: bool,
    method: Method,
    notify: Callable[[str], None],
) -> tuple[str, dict[str, Any]]:
    """Compile programs if the method says so and the compiler is installed.

    Args:
      topology: The devices.
      programs: Functions that compile a program and return its analysis, by name.
      is_certainly_too_large: Whether the arrays that the programs keep do not fit. Then "auto" does
        not compile.
      method: The source of the figures.
      notify: Called with a message before each compilation.

    Returns:
      The source of the figures, and the analysis of each compiled program.

    Raises:
      OvisError: `method` is "compiler", but the compiler is not installed or does not know the
        devices.
    """
    platform, target = topology.device.platform, topology.device.gpu_target
    not_compiled = _why_not_compiled(topology)
    install = install_command(*aot_compile.COMPILER_EXTRAS[platform])
    compiler = aot_compile.installed_compiler(platform)
    if method == "compiler" and not_compiled:
        raise OvisError(f"{not_compiled}; use --method arithmetic")
    if method == "compiler" and compiler is None:
        raise OvisError(f"no compiler for {platform} is installed; install one: {install}")
    if method == "arithmetic":
        return "arithmetic, as requested", {}
    if not_compiled:
        return f"arithmetic; {not_compiled}", {}
    if compiler is None:
        return f"arithmetic; to use the compiler: {install}", {}
    if method == "auto" and is_certainly_too_large:
        return "arithmetic; weights and cache alone exceed the memory", {}
    compiled = {}
    for name, analyze in programs.items():
        notify(f"compiling {name} for {topology.name} with {compiler}; this may take minutes")
        compiled[name] = analyze()
    if target not in (None, topology.kind):
        return f"{compiler}, for the architecture of {target}, the nearest known one", compiled
    return compiler, compiled


def _why_not_compiled(topology: Topology) -> str | None:
    """Return why programs cannot be compiled for a topology, or None if they can."""
    if topology.device.platform == "cuda" and topology.device.gpu_target is None:
        return f"no compiler target is close to {topology.kind}"
    return None


def _notes(workload: Workload) -> list[str]:
    """Return notes about the devices that readers of the plan need."""
    if workload.topology.device.has_bfloat16 or workload.dtype != "bfloat16":
        return []
    return [
        f"{workload.topology.kind} has no bfloat16 units: products are computed in float32 at an"
        " eighth of the speed, and temporary float32 copies of weights are not counted"
    ]


def _peak_with_unread_weights(
    workload: Workload, memory: MemoryEstimate, name: str, program: dict[str, Any]
) -> int:
    """Return a program's peak plus the weights that it does not read, which stay in memory."""
    if program["peak"] is None:
        return memory.peak
    read = {"decoder"}
    if name in ("prefill", "generate"):
        read = set(memory.weights) if workload.num_crops else {"decoder", "visual_embedding"}
    unread = (size for part, size in memory.weights.items() if part not in read)
    return program["peak"] + sum(unread)
