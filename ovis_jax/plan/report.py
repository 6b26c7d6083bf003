"""The plan of a workload as a dictionary, as tables, and as a one-line summary."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal

from rich.console import Console

from ovis_jax.console import print_table
from ovis_jax.errors import OvisError
from ovis_jax.plan import aot_compile
from ovis_jax.plan.latency_bounds import all_reduces_per_decode_step, latency_bounds
from ovis_jax.plan.memory_estimate import (
    RESERVED_FRACTION,
    MemoryEstimate,
    estimate_memory,
    usable_bytes,
)
from ovis_jax.plan.suggestions import smallest_fitting_change
from ovis_jax.plan.topologies import GIB
from ovis_jax.plan.workload import Workload

Method = Literal["auto", "compiler", "arithmetic"]
"""Where figures come from. "auto" compiles if the compiler of the platform is installed."""


def make_plan(
    workload: Workload,
    method: Method = "auto",
    notify: Callable[[str], None] = print,
    programs: Sequence[aot_compile.Program] = aot_compile.REQUEST_PROGRAMS,
) -> dict[str, Any]:
    """Compute the memory on one device, whether the workload fits, and lower bounds of latency.

    Args:
      workload: the workload.
      method: where figures come from.
      notify: called with a message before each compilation.
      programs: programs to compile.

    Returns:
      A JSON-serializable dictionary; sizes are bytes on one device, times are seconds.

    Raises:
      OvisError: the workload is invalid (see `Workload.validate`), or `method` is "compiler" and
        the compiler is not installed.
    """
    workload.validate()
    memory = estimate_memory(workload)
    source, compiled = _compile(workload, memory, method, notify, programs)
    activations, peak = memory.activations, memory.peak
    succeeded = [program for program in compiled.values() if "error" not in program]
    if succeeded:
        activations = max(program["temp"] for program in succeeded)
    if compiled:
        peak = max(
            _peak_with_unread_weights(workload, memory, name, program)
            for name, program in compiled.items()
        )
    usable = usable_bytes(workload)
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
        "source": source,
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


def _compile(
    workload: Workload,
    memory: MemoryEstimate,
    method: Method,
    notify: Callable[[str], None],
    programs: Sequence[aot_compile.Program],
) -> tuple[str, dict[str, Any]]:
    """The source of the figures, and the analysis of each compiled program."""
    platform = workload.topology.device.platform
    install = aot_compile.INSTALL_COMMANDS[platform]
    compiler = aot_compile.installed_compiler(platform)
    if method == "compiler" and compiler is None:
        raise OvisError(f"no compiler for {platform} is installed; install one: {install}")
    if method == "arithmetic":
        return "arithmetic, as requested", {}
    if compiler is None:
        return f"arithmetic; to use the compiler: {install}", {}
    if method == "auto" and memory.peak - memory.activations > usable_bytes(workload):
        return "arithmetic; weights and cache alone exceed the memory", {}
    compiled = {}
    for program in programs:
        notify(
            f"compiling {program} for {workload.topology.name} with {compiler};"
            " this may take minutes"
        )
        compiled[program] = aot_compile.analyze_program(workload, program)
    return compiler, compiled


def _peak_with_unread_weights(
    workload: Workload, memory: MemoryEstimate, name: str, program: dict[str, Any]
) -> int:
    """A program's peak plus the weights that it does not read, which stay in memory."""
    if program["peak"] is None:
        return memory.peak
    read = {"decoder"}
    if name == "prefill":
        read = set(memory.weights) if workload.num_crops else {"decoder", "visual_embedding"}
    unread = (size for part, size in memory.weights.items() if part not in read)
    return program["peak"] + sum(unread)


def plan_summary_line(plan: dict[str, Any]) -> str:
    """Summarize a plan in one line: whether it fits, or the shortfall and the smallest change."""
    where = f"{plan['topology']}, batch {plan['batch']}, max-length {plan['max_length']}"
    if plan["fits"]:
        spare = plan["bytes"]["usable"] - plan["bytes"]["peak"]
        return f"{where}: fits, {_gib(spare)} GiB to spare per device"
    if plan["over_by"]:
        text = f"{where}: does not fit, {_gib(plan['over_by'])} GiB short per device"
    else:
        text = f"{where}: the compiler rejects it: {plan['compiler_errors'][0]}"
    if plan["change"] is None:
        return f"{text}; no known topology of this kind is large enough"
    options, peak = plan["change"]["options"], plan["change"]["peak"]
    return (
        f"{text}; the smallest change that fits: {options} (peak {_gib(peak)} GiB, by arithmetic)"
    )


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Print a plan as tables."""
    mesh = ",".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    console.print(
        f"{plan['topology']} ({plan['devices']} devices), mesh {mesh}, {plan['dtype']},"
        f" batch {plan['batch']} x {plan['max_length']} positions, {plan['crops']} crops",
        soft_wrap=True,
    )
    console.print(f"source of figures: {plan['source']}", markup=False, soft_wrap=True)
    sizes = plan["bytes"]
    rows = [(f"weights: {part}", _gib(size)) for part, size in plan["weights"].items()]
    rows += [(name, _gib(sizes[name])) for name in ("cache", "activations", "peak")]
    rows.append((f"memory minus {RESERVED_FRACTION:.0%}", _gib(sizes["usable"])))
    print_table(console, ("per device", "GiB"), rows)
    if plan["programs"]:
        print_table(console, ("compiled", *plan["programs"]), _program_rows(plan["programs"]))
    else:
        per_block = plan["arithmetic"]["all_reduces_per_block"]
        console.print(f"all-reduces per decoder block: {per_block}")
    console.print(_latency_line(plan), soft_wrap=True)


def _program_rows(programs: dict[str, Any]) -> list[tuple[str, ...]]:
    def row(name: str, value: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        cells = ("too large" if "error" in one else value(one) for one in programs.values())
        return (name, *cells)

    sizes = [
        row(f"{name}, GiB", lambda program, name=name: _gib(program[name], 3))
        for name in ("arguments", "output", "aliased", "temp", "peak")
    ]
    return [
        *sizes,
        row("all-reduces per block", lambda program: str(program["all_reduces_per_block"])),
        row("collectives", lambda program: _format_collectives(program["collectives"])),
        row("weight-sized operations", lambda program: _format_counts(program["weight_sized"])),
        row("kernels", lambda program: _format_counts(program["kernels"])),
        row("compile time", lambda program: f"{program['compile_seconds']:.0f} s"),
    ]


def _format_collectives(found: dict[str, dict[str, int]]) -> str:
    texts = (
        f"{one['count']} {kind}, {one['bytes'] / 2**20:.1f} MiB" for kind, one in found.items()
    )
    return "; ".join(texts) or "none"


def _format_counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in found.items() if count) or "none"


def _latency_line(plan: dict[str, Any]) -> str:
    bounds = plan["latency_bounds"]
    decode, link = bounds["decode_seconds"], bounds["decode_link_seconds"]
    return (
        f"lower bounds of latency: {decode * 1e3:.2f} ms per token at full length"
        f" ({_gib(bounds['decode_bytes_read'])} GiB read), or {plan['batch'] / decode:.0f} tokens/s"
        f" for the batch; in addition, {link * 1e3:.3f} ms on the links"
        f" ({bounds['decode_bytes_sent'] / 2**20:.1f} MiB sent); prefill at full length:"
        f" {bounds['prefill_seconds']:.2f} s ({bounds['prefill_flops'] / 1e12:.0f} TFLOP)"
    )


def _gib(size: int, digits: int = 2) -> str:
    return f"{size / GIB:.{digits}f}"
