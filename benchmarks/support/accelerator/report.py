"""The report: report.md with tables for the docs, report.json, and two plots."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.support.accelerator.results import collect_facts
from ovis_jax.plan.topologies import GIB

Result = Mapping[str, Any]


def write_report(
    out: Path,
    parts: Sequence[Mapping[str, Any]],
    titles: Mapping[str, str],
    results: Sequence[Result],
) -> None:
    """Write report.md and report.json.

    Args:
      out: Folder to write to.
      parts: What `run_part` returned for each part so far.
      titles: Heading of each part.
      results: Results of all cases so far.
    """
    report = {"parts": parts, "results": results}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = ["# ovis_jax on an accelerator", "", *summary(parts, titles, results)]
    tables: Mapping[str, Callable[[Sequence[Result]], list[str]]] = {
        "facts": facts_table,
        "correctness": correctness_table,
        "speed": speed_tables,
        "engine": speed_tables,
        "torch": torch_table,
        "profile": profile_table,
    }
    for part in parts:
        name = part["part"]
        chosen = [x for x in results if x["part"] == name]
        lines += ["", f"## {titles[name]}", ""]
        if part["status"] != "finished":
            lines += [f"The part {part['status']} (exit code {part['exit_code']}).", ""]
        lines += tables[name]([x for x in chosen if x["status"] == "measured"])
        lines += ["", *not_measured(chosen)]
    (out / "report.md").write_text("\n".join(lines).rstrip() + "\n")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Format a table; no lines without rows."""
    if not rows:
        return []

    def line(cells: Sequence[Any]) -> str:
        return f"| {' | '.join(map(str, cells))} |"

    return [line(columns), line(["---"] * len(columns)), *map(line, rows)]


def summary(
    parts: Sequence[Mapping[str, Any]], titles: Mapping[str, str], results: Sequence[Result]
) -> list[str]:
    """Return a line per part: how it ended, and how many cases were measured."""
    rows = []
    for part in parts:
        chosen = [x for x in results if x["part"] == part["part"]]
        counts = [
            f"{number} {status}"
            for status in ("measured", "failed", "omitted")
            if (number := sum(x["status"] == status for x in chosen))
        ]
        wrong = [x["case"] for x in chosen if x.get("passed") is False]
        counts += [f"WRONG: {', '.join(wrong)}"] if wrong else []
        rows.append([titles[part["part"]], part["status"], ", ".join(counts), part["seconds"]])
    return markdown_table(["part", "ended", "cases", "seconds"], rows)


def not_measured(results: Sequence[Result]) -> list[str]:
    """Return a line for each case that failed or was omitted."""
    return [
        f"- {x['case']}: {x['status']}, {x['reason']}" for x in results if x["status"] != "measured"
    ]


def facts_table(results: Sequence[Result]) -> list[str]:
    """Return the facts of the device."""
    facts = collect_facts(results)
    rows = []
    if "device" in facts:
        memory = facts["memory_bytes"]
        rows += [
            ["devices", f"{facts['devices']} x {facts['device']} ({facts['platform']})"],
            ["memory that JAX may use", "unknown" if memory is None else f"{memory / GIB:.1f} GiB"],
        ]
    if "processor" in facts:
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        rows += [
            ["processor", f"{facts['processor']}, {facts['cores']} cores"],
            ["versions", f"Python {facts['python']}, {versions}"],
            ["not installed", ", ".join(facts["missing_packages"]) or "nothing"],
            ["free disk", f"{facts['free_disk_bytes'] / GIB:.0f} GiB"],
            ["date", facts["date"]],
        ]
    rates = {
        "copy_bytes_per_second": ("copy, read and written", "GB/s"),
        "flops_bfloat16": ("bfloat16 matrix product", "GFLOP/s"),
        "flops_float32": ("float32 matrix product", "GFLOP/s"),
        "flops_int8": ("int8 matrix product", "Gop/s"),
    }
    for name, (label, unit) in rates.items():
        if name in facts:
            rows.append([label, f"{facts[name] / 1e9:,.0f} {unit}"])
    return markdown_table(["fact", "value"], rows)


def correctness_table(results: Sequence[Result]) -> list[str]:
    """Return what was compared, and whether it passed."""
    rows = []
    for x in results:
        detail = ""
        if "difference" in x:
            detail = f"largest difference {x['difference']:.1e}, allowed {x['tolerance']:.0e}"
        elif "stages" in x:
            share = x["largest_part_of_tolerance"]
            detail = f"{x['stages']} stages, at most {share:.0%} of the tolerance"
            detail = "; ".join([detail, *x["failed_stages"]])
        elif "questions" in x:
            detail = f"{x['questions']} questions" + "".join(
                f"; {name}: {answer!r}" for name, answer in x["wrong_answers"].items()
            )
        elif "requests" in x:
            detail = f"{x['requests']} requests, {len(x['different'])} answers differ"
        rows.append([x["case"], "pass" if x["passed"] else "**FAIL**", detail])
    return markdown_table(["compared", "result", "details"], rows)


def speed_tables(results: Sequence[Result]) -> list[str]:
    """Return the table of the stages, and that of the engine and training."""
    stages = [
        [
            x["case"],
            f"{x['step']['median'] * 1e3:.3g}" if x["step"]["median"] > 0 else "too short to time",
            rate(x),
            percent(x, "bandwidth_share"),
            percent(x, "flop_share"),
            gib(x, "temp_bytes"),
            gib(x, "plan_temp_bytes"),
            gib(x, "peak_bytes"),
            seconds(x, "compile_seconds"),
        ]
        for x in results
        if "step" in x
    ]
    columns = ["stage", "ms per step", "rate", "of bandwidth", "of FLOP rate", "temporary GiB"]
    columns += ["plan's estimate GiB", "peak GiB", "compile s"]
    others = [
        [
            x["case"],
            f"{x['call']['median'] if 'call' in x else x['case_seconds']:.3g}",
            rate(x),
            gib(x, "peak_bytes"),
            seconds(x, "compile_seconds"),
        ]
        for x in results
        if "step" not in x
    ]
    lines = markdown_table(columns, stages)
    return [
        *lines,
        *([""] if lines and others else []),
        *markdown_table(["case", "s", "rate", "peak GiB", "compile s"], others),
    ]


def torch_table(results: Sequence[Result]) -> list[str]:
    """Return both sides of each stage, and their ratio."""
    rows = [
        [
            x["case"],
            f"{x['step']['median'] * 1e3:.3g}",
            f"{x['torch_step']['median'] * 1e3:.3g}",
            f"{x['ratio']:.2f} ({x['ratio_lowest']:.2f} - {x['ratio_highest']:.2f})",
        ]
        for x in results
        if "ratio" in x
    ]
    return markdown_table(["stage", "ours ms", "PyTorch ms", "PyTorch / ours"], rows)


def profile_table(results: Sequence[Result]) -> list[str]:
    """Return the largest kernels of each profile."""
    rows = [
        [x["case"], f"`{kernel['kernel'][:80]}`", f"{kernel['seconds'] * 1e3:.3g}"]
        + [f"{kernel['share']:.1%}"]
        for x in results
        for kernel in x["largest"]
    ]
    return markdown_table(["program", "kernel", "ms per step", "share"], rows)


def rate(result: Result) -> str:
    """Return the first rate of a result, such as "123 tokens/s"."""
    for name, value in result.items():
        if name.endswith("_per_second"):
            return f"{value:,.4g} {name.removesuffix('_per_second')}/s"
    return ""


def percent(result: Result, name: str) -> str:
    """Return a field in percent; empty if the result lacks it."""
    return f"{result[name]:.0%}" if name in result else ""


def gib(result: Result, name: str) -> str:
    """Return a field in GiB; empty if the result lacks it."""
    return f"{result[name] / GIB:.2f}" if name in result else ""


def seconds(result: Result, name: str) -> str:
    """Return a field in seconds; empty if the result lacks it."""
    return f"{result[name]:.1f}" if name in result else ""


def write_plots(out: Path, results: Sequence[Result]) -> None:
    """Plot the roofline and the tokens per second by rows; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure  # matplotlib is optional
    except ModuleNotFoundError:
        return
    facts = collect_facts(results)
    # A stage that was too short to time has no rates.
    stages = [x for x in results if "step" in x and "flops" in x and x["part"] == "speed"]
    if stages and {"copy_bytes_per_second", "flops_bfloat16"} <= facts.keys():
        figure = Figure(figsize=(8, 5))
        axes = figure.subplots()
        bandwidth, peak = (
            facts[name] * facts.get("devices", 1)
            for name in ("copy_bytes_per_second", "flops_bfloat16")
        )
        intensities = [x["flops"] / x["bytes"] for x in stages]
        low, high = min(intensities) / 2, max([*intensities, peak / bandwidth]) * 2
        corner = peak / bandwidth
        axes.plot([low, corner, high], [low * bandwidth, peak, peak], color="black", linewidth=1)
        for x, intensity in zip(stages, intensities, strict=True):
            flops_per_second = x["flops"] / x["step"]["median"]
            axes.plot(intensity, flops_per_second, marker="o")
            axes.annotate(x["case"], (intensity, flops_per_second), fontsize=7)
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="FLOP per second")
        axes.set_title(f"{facts.get('device', '')}: measured stages below the measured limits")
        figure.tight_layout()
        figure.savefig(out / "roofline.png", dpi=120)
    decode = [x for x in stages if x["case"].startswith("decode")]
    engine = [x for x in results if x["part"] == "engine" and "requests" in x]
    if decode or engine:
        figure = Figure(figsize=(6, 4.5))
        axes = figure.subplots()
        for label, chosen, key in (("decode", decode, "rows"), ("engine", engine, "requests")):
            if chosen:
                chosen = sorted(chosen, key=lambda x: x[key])
                rates = [x["tokens_per_second"] for x in chosen]
                axes.plot([x[key] for x in chosen], rates, marker="o", label=label)
        axes.set(xlabel="rows or requests", ylabel="tokens per second", xscale="log")
        axes.legend()
        figure.tight_layout()
        figure.savefig(out / "tokens_per_second.png", dpi=120)
