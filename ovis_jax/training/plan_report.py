"""Reports of training plans."""

from typing import Any

from rich.console import Console

from ovis_jax.console import print_table
from ovis_jax.errors import count_noun
from ovis_jax.plan.memory_estimate import RESERVED_FRACTION
from ovis_jax.plan.report import describe_fit, format_gib, program_rows


def training_summary_line(plan: dict[str, Any]) -> str:
    """Say in one line whether a recipe fits and, if not, the shortfall and what would fit."""
    size = f"{count_noun(plan['rows'], 'row')} of {count_noun(plan['length'], 'position')}"
    text = describe_fit(f"{plan['training']} on {plan['topology']}, {size}", plan)
    if plan["fits"]:
        return text
    if not plan["changes"]:
        return f"{text}; no change of the method, the micro-batch, the mesh or the topology fits"
    changes = (
        f"{change['options']} (peak {format_gib(change['peak'])} GiB)" for change in plan["changes"]
    )
    return f"{text}; by arithmetic, each of these fits: {'; '.join(changes)}"


def print_training_plan(plan: dict[str, Any], console: Console) -> None:
    """Print a training plan as tables."""
    mesh = ",".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    rules = "" if plan["rules"] is None else f", rules {plan['rules']}"
    console.print(
        f"{plan['topology']} ({count_noun(plan['devices'], 'device')}), mesh {mesh}{rules},"
        f" {plan['training']}, {plan['dtype']}, {'with' if plan['remat'] else 'without'} remat,"
        f" micro-batches of {count_noun(plan['rows'], 'row')} x"
        f" {count_noun(plan['length'], 'position')} with"
        f" {count_noun(plan['crops_per_row'], 'crop')} each",
        soft_wrap=True,
    )
    console.print(f"source of figures: {plan['source']}", markup=False, soft_wrap=True)
    sizes = plan["bytes"]
    hidden = (
        ("usable", "memory")
        if sizes["reference model"]
        else ("reference model", "usable", "memory")
    )
    rows = [(name, format_gib(size)) for name, size in sizes.items() if name not in hidden]
    rows.append((f"memory minus {RESERVED_FRACTION:.0%}", format_gib(sizes["usable"])))
    print_table(console, ("per device", "GiB"), rows)
    if plan["programs"]:
        print_table(console, ("compiled", *plan["programs"]), program_rows(plan["programs"]))
