"""A plan as one dictionary, from the compiler or by arithmetic, and as tables."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal

from rich.console import Console

from ovis_jax.console import print_table
from ovis_jax.errors import OvisError
from ovis_jax.plan import compiler
from ovis_jax.plan.advice import smallest_change
from ovis_jax.plan.arguments import Case
from ovis_jax.plan.devices import GIB
from ovis_jax.plan.estimate import MARGIN, Needs, floors, needs, sums_of_a_step, usable_bytes

By = Literal["auto", "compiler", "arithmetic"]


def make_plan(
    case: Case,
    by: By = "auto",
    tell: Callable[[str], None] = print,
    steps: Sequence[compiler.Step] = compiler.STEPS,
) -> dict[str, Any]:
    """What a case needs on one device, whether it fits, and how fast it could be.

    Args:
      case: what is asked about.
      by: "auto" compiles where the compiler for the topology is installed.
      tell: is given a line before each wait.
      steps: what to compile.

    Returns:
      A dictionary that JSON can hold; sizes are bytes on one device, times are seconds.

    Raises:
      OvisError: the case is not possible (see `Case.check`), or its compiler is not installed and
        `by` is "compiler".
    """
    case.check()
    need = needs(case)
    source, compiled = _compile(case, need, by, tell, steps)
    activations, peak = need.activations, need.peak
    measured = [step for step in compiled.values() if "error" not in step]
    if measured:
        activations = max(step["temp"] for step in measured)
    if compiled:
        peak = max(_resident(case, need, name, step) for name, step in compiled.items())
    usable = usable_bytes(case)
    over = max(peak - usable, 0)
    refused = [step["error"] for step in compiled.values() if "error" in step]
    plan = {
        "topology": case.topology.name,
        "devices": case.topology.num_devices,
        "mesh": {"data": case.data, "model": case.model},
        "batch": case.batch,
        "max_length": case.max_length,
        "crops": case.crops,
        "dtype": case.dtype,
        "source": source,
        "weights": need.weights,
        "bytes": {
            "weights": sum(need.weights.values()),
            "cache": need.cache,
            "activations": activations,
            "peak": peak,
            "usable": usable,
            "memory": case.topology.device.hbm_bytes,
        },
        "arithmetic": {
            "decode_arguments": need.weights["decoder"] + need.cache,
            "decode_temp": need.decode_temp,
            "prefill_temp": need.prefill_temp,
            "peak": need.peak,
            "all_reduces_a_block": min(sums_of_a_step(case), 2),
        },
        "steps": compiled,
        "floors": asdict(floors(case, need)),
        "fits": not over and not refused,
        "over_by": over,
        "refused": refused,
        "change": None,
    }
    if not plan["fits"]:
        change = smallest_change(case, max(peak - need.peak, 0))
        if change is not None:
            plan["change"] = {"options": change[0], "peak": needs(change[1]).peak}
    return plan


def _compile(
    case: Case,
    need: Needs,
    by: By,
    tell: Callable[[str], None],
    steps: Sequence[compiler.Step],
) -> tuple[str, dict[str, Any]]:
    """Where figures come from, and what the compiler says of each step."""
    platform = case.topology.device.platform
    found = compiler.find_compiler(platform)
    if by == "compiler" and found is None:
        raise OvisError(f"no compiler for {platform} is installed: {compiler.INSTALL[platform]}")
    if by == "arithmetic":
        return "arithmetic, as asked", {}
    if found is None:
        return f"arithmetic; to compile: {compiler.INSTALL[platform]}", {}
    if by == "auto" and need.peak - need.activations > usable_bytes(case):
        return "arithmetic; weights and cache alone are too large to compile for", {}
    compiled = {}
    for step in steps:
        tell(f"compiling {step} for {case.topology.name} with {found}; this may take minutes")
        compiled[step] = compiler.facts(case, step)
    return found, compiled


def _resident(case: Case, need: Needs, name: str, step: dict[str, Any]) -> int:
    """A program's peak, and the weights that stay beside it because it does not read them."""
    if step["peak"] is None:
        return need.peak
    read = {"decoder"}
    if name == "prefill":
        read = set(need.weights) if case.crops else {"decoder", "visual_embedding"}
    return step["peak"] + sum(size for part, size in need.weights.items() if part not in read)


def verdict(plan: dict[str, Any]) -> str:
    """Whether it fits, in one line; if not, by how much and what would."""
    where = f"{plan['topology']}, batch {plan['batch']}, max-length {plan['max_length']}"
    left = plan["bytes"]["usable"] - plan["bytes"]["peak"]
    if plan["fits"]:
        return f"{where}: fits, {_gib(left)} GiB a device to spare"
    if plan["over_by"]:
        text = f"{where}: does not fit, {_gib(plan['over_by'])} GiB a device too much"
    else:
        text = f"{where}: the compiler refuses it: {plan['refused'][0]}"
    if plan["change"] is None:
        return f"{text}; no topology of this kind that is known would hold it"
    options, peak = plan["change"]["options"], plan["change"]["peak"]
    return (
        f"{text}; the smallest change that fits: {options} (peak {_gib(peak)} GiB, by arithmetic)"
    )


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Print the tables of a plan."""
    mesh = ",".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    console.print(
        f"{plan['topology']} ({plan['devices']} devices), mesh {mesh}, {plan['dtype']},"
        f" batch {plan['batch']} x {plan['max_length']} positions, {plan['crops']} crops",
        soft_wrap=True,
    )
    console.print(f"figures from: {plan['source']}", markup=False, soft_wrap=True)
    sizes = plan["bytes"]
    rows = [(f"weights: {part}", _gib(size)) for part, size in plan["weights"].items()]
    rows += [(name, _gib(sizes[name])) for name in ("cache", "activations", "peak")]
    rows.append((f"memory, less {MARGIN:.0%}", _gib(sizes["usable"])))
    print_table(console, ("on one device", "GiB"), rows)
    if plan["steps"]:
        print_table(console, ("compiled", *plan["steps"]), _step_rows(plan["steps"]))
    else:
        a_block = plan["arithmetic"]["all_reduces_a_block"]
        console.print(f"all-reduces a decoder block: {a_block}")
    console.print(_times(plan), soft_wrap=True)


def _step_rows(steps: dict[str, Any]) -> list[tuple[str, ...]]:
    def row(name: str, value: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        cells = ("too large" if "error" in step else value(step) for step in steps.values())
        return (name, *cells)

    sizes = [
        row(f"{name}, GiB", lambda step, name=name: _gib(step[name], 3))
        for name in ("arguments", "output", "aliased", "temp", "peak")
    ]
    return [
        *sizes,
        row("all-reduces a block", lambda step: str(step["all_reduces_a_block"])),
        row("collectives", lambda step: _collectives(step["collectives"])),
        row("of weight size", lambda step: _counts(step["weight_sized"])),
        row("kernels", lambda step: _counts(step["kernels"])),
        row("compiled in", lambda step: f"{step['compile_seconds']:.0f} s"),
    ]


def _collectives(found: dict[str, dict[str, int]]) -> str:
    texts = (
        f"{one['count']} {kind}, {one['bytes'] / 2**20:.1f} MiB" for kind, one in found.items()
    )
    return "; ".join(texts) or "none"


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in found.items() if count) or "none"


def _times(plan: dict[str, Any]) -> str:
    floor = plan["floors"]
    token, link = floor["decode_seconds"], floor["decode_link_seconds"]
    return (
        f"time floors: {token * 1e3:.2f} ms a token at full length"
        f" ({_gib(floor['decode_bytes'])} GiB read), that is {plan['batch'] / token:.0f} tokens/s"
        f" over the batch; beside it {link * 1e3:.3f} ms on the links"
        f" ({floor['decode_link_bytes'] / 2**20:.1f} MiB sent); prompts of full length:"
        f" {floor['prefill_seconds']:.2f} s ({floor['prefill_flops'] / 1e12:.0f} TFLOP)"
    )


def _gib(size: int, digits: int = 2) -> str:
    return f"{size / GIB:.{digits}f}"
