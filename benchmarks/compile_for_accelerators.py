"""Does the 9B model fit on accelerators, and does the compiler produce efficient programs?

`python -m benchmarks.compile_for_accelerators` makes a plan for each topology, as `ovis-jax plan`
does, and checks the compiled programs. Figures come from the compiler if it is installed, and from
formulas otherwise. No program is executed, and no accelerator is needed. Sizes are per device.
"""

import re
from dataclasses import replace
from typing import Annotated, Any, NamedTuple, get_args

import typer
from rich.console import Console

from benchmarks.support.results import (
    JsonOption,
    PlotOption,
    plot_results,
    print_results,
    write_results,
)
from ovis_jax.config import OvisConfig
from ovis_jax.model.kv_cache import KVCacheDtype
from ovis_jax.plan.aot_compile import (
    REQUEST_PROGRAMS,
    Program,
    analyze_program,
)
from ovis_jax.plan.make_plan import Method, make_plan
from ovis_jax.plan.report import plan_summary_line
from ovis_jax.plan.topologies import GIB
from ovis_jax.plan.workload_from_names import load_config, make_workload
from ovis_jax.plan_command import MethodOption
from ovis_jax.quantization import QuantizationFormat


class Target(NamedTuple):
    """A workload of the 9B: one GPU or TPU slice, and the largest batch of requests.

    The fields are those of `Workload`.
    """

    topology: str
    batch_size: int = 1
    max_length: int = 4096
    quantization: QuantizationFormat | None = None
    kv_cache_dtype: KVCacheDtype = "auto"


TARGETS = (
    Target("v5e:2x4", 8, 8192),
    Target("v6e:1x1", 1, 4224),
    Target("v6e:2x2", 8, 8192),
    Target("v5p:2x2x1", 8, 8192),
    Target("h100:1", 1, 4096),
    Target("h100:8", 8, 8192),
    Target("a100:1", 1, 4096),
    Target("v5e:1x1", 1, 4096, "int8"),
    Target("v5e:1x1", 1, 4096, "int4"),
    Target("v5e:1x1", 4, 4096, "int8", "int8"),
    Target("v6e:1x1", 8, 4096, "int8"),
    Target("v6e:1x1", 8, 4096, "int4"),
    Target("h100:1", 8, 4096, "int8"),
    Target("h100:1", 8, 4096, "int4"),
    Target("a100:1", 1, 4096, "int8"),
    Target("a100:1", 1, 4096, "int4"),
)

QUANTIZED_PROMPT_LENGTH = 2048
"""Length of the prompt with one image in the programs of quantized models, in positions."""

ATTENTION_KERNEL = re.compile("splash|mosaic|triton")
"""Matches the names of the attention kernels."""

MAX_DECODE_TEMP = 0.02
"""Maximum temporary arrays of a decode step, as a fraction of its arguments."""

MAX_IMAGE_TEMP = GIB
"""Maximum temporary arrays of one image with ten crops, in bytes."""


def passed_checks(plan: dict[str, Any]) -> dict[str, bool]:
    """Check a plan and its compiled programs.

    Args:
      plan: result of `make_plan`.

    Returns:
      For each check, whether it passed.
    """
    passed = {"fits": plan["fits"]}
    for name, program in plan["programs"].items():
        if "error" in program:
            passed[f"{name}: compiles"] = False
            continue
        if name == "decode":
            passed["decode: cache fully aliased"] = program["aliased"] >= program["cache"]
            small = program["temp"] < MAX_DECODE_TEMP * program["arguments"]
            passed[f"decode: temp under {MAX_DECODE_TEMP:.0%} of arguments"] = small
        elif name == "images":
            passed["images: temp under 1 GiB"] = program["temp"] < MAX_IMAGE_TEMP
        else:
            kernels = program["kernels"]
            passed[f"{name}: uses an attention kernel"] = any(map(ATTENTION_KERNEL.search, kernels))
        passed[f"{name}: at most 2 all-reduces per block"] = program["all_reduces_per_block"] <= 2
        for operation, count in program["weight_sized"].items():
            passed[f"{name}: no weight-sized {operation}"] = not count
    return passed


def main(
    topology: Annotated[
        list[str] | None, typer.Option(help="Topology to make a plan for; may be repeated.")
    ] = None,
    quantization: Annotated[
        QuantizationFormat | None,
        typer.Option(help="Quantization of the weights; only with --topology."),
    ] = None,
    kv_cache_dtype: Annotated[
        KVCacheDtype, typer.Option(help="Dtype of the KV cache; only with --topology.")
    ] = "auto",
    config: Annotated[
        str, typer.Option(help="Model: 9b, 27b, 3b, or a folder with config.json.")
    ] = "9b",
    images: Annotated[int, typer.Option(help="Number of images per row.")] = 0,
    program: Annotated[Program | None, typer.Option(help="Compile only this program.")] = None,
    method: MethodOption = "auto",
    json_path: JsonOption = None,
    plot_path: PlotOption = None,
) -> None:
    """Make a plan for each topology, and print the results; exit with code 1 if a check fails."""
    targets = TARGETS
    if topology:
        targets = [_find_target(name, quantization, kv_cache_dtype) for name in topology]
    selected: tuple[Program, ...] = (program,) if program else get_args(Program)
    loaded = load_config(config)
    plans = [_compile_target(loaded, target, images, selected, method) for target in targets]
    print_results(f"{config}, GiB per device", *plan_table(plans))
    print_results("compiled programs, GiB per device", *program_table(plans))
    num_failed = print_checks(plans)
    checked = [{**plan, "checks": passed_checks(plan)} for plan in plans]
    write_results(json_path, config=config, plans=checked)
    if plot_path is not None:
        labels = [_label(plan) for plan in plans]
        parts = ("weights", "cache", "activations", "usable")
        series = {part: [plan["bytes"][part] / GIB for plan in plans] for part in parts}
        plot_results(plot_path, f"Ovis {config}: memory of one device", labels, series, "GiB")
    if num_failed:
        raise typer.Exit(1)


def _find_target(
    topology: str, quantization: QuantizationFormat | None, kv_cache_dtype: KVCacheDtype
) -> Target:
    """Return the target with these values, or a new one with the default batch."""
    wanted = Target(topology, quantization=quantization, kv_cache_dtype=kv_cache_dtype)
    same = (x for x in TARGETS if x._replace(batch_size=1, max_length=4096) == wanted)
    return next(same, wanted)


def _compile_target(
    config: OvisConfig,
    target: Target,
    images: int,
    programs: tuple[Program, ...],
    method: Method,
) -> dict[str, Any]:
    """Make the plan for a target, with every program that was asked for.

    A quantized model also compiles a prompt with one image, and `generate` as one program.
    """
    notes = Console(stderr=True, highlight=False)
    name, batch_size, max_length, quantization, kv_cache_dtype = target
    workload = make_workload(
        config,
        name,
        batch_size,
        max_length,
        images_per_row=images,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
    )
    wanted: tuple[Program, ...] = REQUEST_PROGRAMS
    if quantization is not None:
        workload = replace(
            workload, prompt_length=QUANTIZED_PROMPT_LENGTH, images_per_row=max(images, 1)
        )
        wanted = (*REQUEST_PROGRAMS, "generate")
    request_programs: list[Program] = [one for one in wanted if one in programs]
    plan = make_plan(workload, method, notes.print, request_programs)
    if "images" in programs and plan["programs"]:
        notes.print(f"compiling one image for {name}")
        one_image = replace(workload, batch_size=1, images_per_row=1)
        plan["programs"]["images"] = analyze_program(one_image, "images")
    return plan


def _label(plan: dict[str, Any]) -> str:
    """Return the topology of a plan, and the formats of its weights and its cache."""
    formats = [plan["quantization"], plan["kv_cache_dtype"] != "auto" and "int8 cache"]
    return " ".join([plan["topology"], *(x for x in formats if x)])


def plan_table(plans: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of each target's memory and its lower bound of latency."""
    columns = "target rows length weights cache activations peak usable".split()
    rows = [
        [
            _label(plan),
            str(plan["batch"]),
            str(plan["max_length"]),
            *(f"{plan['bytes'][name] / GIB:.2f}" for name in columns[3:]),
            f"{plan['latency_bounds']['decode_seconds'] * 1e3:.2f}",
            plan["source"],
        ]
        for plan in plans
    ]
    return [*columns, "min ms per token", "source of figures"], rows


def program_table(plans: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of each compiled program's memory and operations."""
    sizes = ("arguments", "output", "aliased", "temp", "peak")
    counts = ("all-reduces", "per block", "weight-sized", "kernels")
    columns = ["target", "program", *sizes, *counts, "compile s"]
    rows = []
    for plan in plans:
        for name, program in plan["programs"].items():
            row = [_label(plan), name]
            if "error" in program:
                rows.append([*row, *[""] * (len(columns) - 3), "too large"])
                continue
            row += [f"{program[size] / GIB:.3f}" for size in sizes]
            row.append(str(program["collectives"].get("all-reduce", {"count": 0})["count"]))
            row.append(str(program["all_reduces_per_block"]))
            row += [str(sum(program[key].values())) for key in ("weight_sized", "kernels")]
            rows.append([*row, f"{program['compile_seconds']:.0f}"])
    return columns, rows


def print_checks(plans: list[dict[str, Any]]) -> int:
    """Print the failed checks of each target; return their number."""
    console, num_failed = Console(highlight=False), 0
    for plan in plans:
        passed = passed_checks(plan)
        failed = [name for name, good in passed.items() if not good]
        num_failed += len(failed)
        result = f"FAILED {'; '.join(failed)}" if failed else "all passed"
        console.print(f"{_label(plan)}: {len(passed)} checks, {result}", soft_wrap=True)
        if not plan["fits"]:
            console.print(f"  {plan_summary_line(plan)}", soft_wrap=True)
    return num_failed


if __name__ == "__main__":
    typer.run(main)
