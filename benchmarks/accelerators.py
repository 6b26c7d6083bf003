"""The 9B model on real accelerators, compiled without one: does it fit, is anything wasted?

`python -m benchmarks.accelerators` takes each target's plan (`ovis-jax plan`): from the compiler
where its package is installed, else by arithmetic, and checks what the compiler made of it. Nothing
is executed. Bytes are those of one device.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console

from benchmarks.measure import machine, plot, print_table, write_json
from ovis_jax.plan.command import find_config, make_case
from ovis_jax.plan.compiler import STEPS, Step, facts, find_compiler
from ovis_jax.plan.devices import GIB
from ovis_jax.plan.report import By, make_plan, verdict

TARGETS = {
    "v5e:2x4": (8, 8192),
    "v6e:1x1": (1, 4224),
    "v6e:2x2": (8, 8192),
    "v5p:2x2x1": (8, 8192),
    "h100:1": (1, 4096),
    "h100:8": (8, 8192),
    "a100:1": (1, 4096),
}
"""Topologies with a batch and a max-length for each."""

ATTENTION = re.compile("splash|mosaic|triton")
"""What the kernels that the model calls for attention have in their names."""

DECODE_TEMP = 0.02
"""Temporary arrays of a decode step may take this share of its arguments."""

IMAGES_TEMP = GIB
"""Bytes that the temporary arrays of one image, ten crops, may take."""


def checks(plan: dict[str, Any]) -> dict[str, bool]:
    """What must hold of a plan, by name; of steps that were not compiled nothing is said."""
    found = {"fits": plan["fits"]}
    for name, step in plan["steps"].items():
        if "error" in step:
            found[f"{name}: compiles"] = False
            continue
        if name == "decode":
            found["decode: cache fully aliased"] = step["aliased"] >= step["cache"]
            temp = step["temp"] < DECODE_TEMP * step["arguments"]
            found[f"decode: temp under {DECODE_TEMP:.0%} of arguments"] = temp
        elif name == "images":
            found["images: temp under 1 GiB"] = step["temp"] < IMAGES_TEMP
        else:
            attention = any(ATTENTION.search(kernel) for kernel in step["kernels"])
            found["prefill: attention kernel is there"] = attention
        found[f"{name}: at most 2 all-reduces a block"] = step["all_reduces_a_block"] <= 2
        for what, count in step["weight_sized"].items():
            found[f"{name}: no weight-sized {what}"] = not count
    return found


def main(
    topology: Annotated[list[str] | None, typer.Option(help="Only these targets.")] = None,
    config: Annotated[str, typer.Option(help="9b, 27b, or a folder with config.json.")] = "9b",
    images: Annotated[int, typer.Option(help="Images in each row.")] = 0,
    step: Annotated[Step | None, typer.Option(help="Compile only this step.")] = None,
    by: Annotated[By, typer.Option(help="auto compiles where the compiler is there.")] = "auto",
    output: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw the bytes here.")] = None,
) -> None:
    """Plan for each target, print tables and checks; exit code 1 where a check fails."""
    notes, plans = Console(stderr=True, highlight=False), []
    for name in topology or TARGETS:
        batch, max_length = TARGETS.get(name, (1, 4096))
        case = make_case(find_config(config), name, batch, max_length, images=images)
        wanted = (step,) if step else get_args(Step)
        plan = make_plan(case, by, notes.print, [one for one in STEPS if one in wanted])
        compiler = find_compiler(case.topology.device.platform)
        if "images" in wanted and by != "arithmetic" and compiler is not None:
            notes.print(f"compiling one image for {name}")
            plan["steps"]["images"] = facts(replace(case, batch=1, images=1), "images")
        plans.append(plan)
    print_table(f"{config}, bfloat16, GiB a device", *sizes(plans))
    print_table("compiled, GiB a device", *compiled(plans))
    failed = report(plans)
    if output is not None:
        every = [{**plan, "checks": checks(plan)} for plan in plans]
        write_json(output, machine=machine(), config=config, plans=every)
    if picture is not None:
        labels = [plan["topology"] for plan in plans]
        parts = ("weights", "cache", "activations", "usable")
        series = {part: [plan["bytes"][part] / GIB for plan in plans] for part in parts}
        plot(picture, f"Ovis {config}: memory of one device", labels, series, "GiB")
    if failed:
        raise typer.Exit(1)


def sizes(plans: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What each target needs, and the least time for a token."""
    columns = "target rows length weights cache activations peak usable".split()
    rows = [
        [
            plan["topology"],
            str(plan["batch"]),
            str(plan["max_length"]),
            *(f"{plan['bytes'][name] / GIB:.2f}" for name in columns[3:]),
            f"{plan['floors']['decode_seconds'] * 1e3:.2f}",
            plan["source"],
        ]
        for plan in plans
    ]
    return [*columns, "floor, ms a token", "figures from"], rows


def compiled(plans: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What the compiler made of each step."""
    names = ("arguments", "output", "aliased", "temp", "peak")
    columns = ["target", "step", *names, "all-reduces", "a block", "of weight size", "kernels", "s"]
    rows = []
    for plan in plans:
        for name, step in plan["steps"].items():
            row = [plan["topology"], name]
            if "error" in step:
                rows.append([*row, *[""] * (len(columns) - 3), "too large"])
                continue
            row += [f"{step[size] / GIB:.3f}" for size in names]
            row.append(str(step["collectives"].get("all-reduce", {"count": 0})["count"]))
            row.append(str(step["all_reduces_a_block"]))
            row += [str(sum(step[key].values())) for key in ("weight_sized", "kernels")]
            rows.append([*row, f"{step['compile_seconds']:.0f}"])
    return columns, rows


def report(plans: list[dict[str, Any]]) -> int:
    """Print what failed of each target's checks; gives how many did."""
    console, failed = Console(highlight=False), 0
    for plan in plans:
        found = checks(plan)
        wrong = [name for name, good in found.items() if not good]
        failed += len(wrong)
        result = f"FAILED {'; '.join(wrong)}" if wrong else "all hold"
        console.print(f"{plan['topology']}: {len(found)} checks, {result}", soft_wrap=True)
        if not plan["fits"]:
            console.print(f"  {verdict(plan)}", soft_wrap=True)
    return failed


if __name__ == "__main__":
    typer.run(main)
