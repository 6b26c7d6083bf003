"""A plan as tables and as a one-line summary."""

from collections.abc import Callable
from typing import Any

from rich.console import Console

from ovis_jax.console import print_table
from ovis_jax.errors import count_noun
from ovis_jax.plan.memory_estimate import RESERVED_FRACTION
from ovis_jax.plan.topologies import GIB


def describe_fit(where: str, plan: dict[str, Any]) -> str:
    """Say whether a plan fits, and the spare memory, the shortfall or the compiler's error."""
    if plan["fits"]:
        spare = plan["bytes"]["usable"] - plan["bytes"]["peak"]
        return f"{where}: fits, {format_gib(spare)} GiB to spare per device"
    if plan["over_by"]:
        return f"{where}: does not fit, {format_gib(plan['over_by'])} GiB short per device"
    return f"{where}: the compiler rejects it: {plan['compiler_errors'][0]}"


def plan_summary_line(plan: dict[str, Any]) -> str:
    """Say in one line whether a plan fits and, if not, the shortfall and the smallest change."""
    size = f"batch-size {plan['batch']}, max-model-len {plan['max_length']}"
    text = describe_fit(f"{plan['topology']}, {size}", plan)
    if plan["fits"]:
        return text
    if plan["change"] is None:
        return f"{text}; no known topology of this kind is large enough"
    options, peak = plan["change"]["options"], plan["change"]["peak"]
    return (
        f"{text}; the smallest change that fits: {options} (peak {format_gib(peak)} GiB, by"
        " arithmetic)"
    )


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Print a plan as tables."""
    mesh = ",".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    console.print(
        f"{plan['topology']} ({count_noun(plan['devices'], 'device')}), mesh {mesh},"
        f" {_format_dtypes(plan)},"
        f" batch {plan['batch']} x {count_noun(plan['max_length'], 'position')},"
        f" {count_noun(plan['crops'], 'crop')}",
        soft_wrap=True,
    )
    console.print(f"source of figures: {plan['source']}", markup=False, soft_wrap=True)
    for note in plan["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    sizes = plan["bytes"]
    rows = [(f"weights: {part}", format_gib(size)) for part, size in plan["weights"].items()]
    rows += [(name, format_gib(sizes[name])) for name in ("cache", "activations", "peak")]
    rows.append((f"memory minus {RESERVED_FRACTION:.0%}", format_gib(sizes["usable"])))
    print_table(console, ("per device", "GiB"), rows)
    if plan["programs"]:
        print_table(console, ("compiled", *plan["programs"]), program_rows(plan["programs"]))
    else:
        per_block = plan["arithmetic"]["all_reduces_per_block"]
        console.print(f"all-reduces per decoder block: {per_block}")
    console.print(_latency_line(plan), soft_wrap=True)


def _format_dtypes(plan: dict[str, Any]) -> str:
    quantization = plan["quantization"]
    weights = "" if quantization is None else f" with {quantization} weights"
    cache = "" if plan["kv_cache_dtype"] == "auto" else f", {plan['kv_cache_dtype']} KV cache"
    return f"{plan['dtype']}{weights}{cache}"


def program_rows(programs: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of a table with the analysis of each compiled program."""

    def row(name: str, value: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        cells = ("too large" if "error" in one else value(one) for one in programs.values())
        return (name, *cells)

    sizes = [
        row(f"{name}, GiB", lambda program, name=name: format_gib(program[name], 3))
        for name in ("arguments", "output", "aliased", "temp", "peak")
    ]
    of_requests = []
    if any("weight_sized" in program for program in programs.values()):
        of_requests = [
            row("all-reduces per block", lambda program: str(program["all_reduces_per_block"])),
            row("weight-sized operations", lambda program: _format_counts(program["weight_sized"])),
        ]
    return [
        *sizes,
        *of_requests,
        row("collectives", lambda program: _format_collectives(program["collectives"])),
        row("kernels", lambda program: _format_counts(program["kernels"])),
        row("compile time", lambda program: f"{program['compile_seconds']:.0f} s"),
    ]


def _format_collectives(found: dict[str, dict[str, int]]) -> str:
    texts = (
        f"{kind}: {one['count']}, {one['bytes'] / 2**20:.1f} MiB" for kind, one in found.items()
    )
    return "; ".join(texts) or "none"


def _format_counts(found: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in found.items() if count) or "none"


def _latency_line(plan: dict[str, Any]) -> str:
    bounds = plan["latency_bounds"]
    decode, link = bounds["decode_seconds"], bounds["decode_link_seconds"]
    return (
        f"lower bounds of latency: {decode * 1e3:.2f} ms per token at full length"
        f" ({format_gib(bounds['decode_bytes_read'])} GiB read), or {plan['batch'] / decode:.0f}"
        f" tokens/s for the batch; in addition, {link * 1e3:.3f} ms on the links"
        f" ({bounds['decode_bytes_sent'] / 2**20:.1f} MiB sent); prefill at full length:"
        f" {bounds['prefill_seconds']:.2f} s ({bounds['prefill_flops'] / 1e12:.0f} TFLOP)"
    )


def format_gib(size: int, digits: int = 2) -> str:
    """Format bytes as a number of GiB."""
    return f"{size / GIB:.{digits}f}"
