"""Inference beside PyTorch, stage by stage: the same checkpoint, the same threads, in turn.

`python -m benchmarks.against_torch` measures the preset `bench` with random weights; `--model` one
in a folder of the Hub's layout. A ratio is PyTorch's time over ours: above 1 we are faster. The
floor is what the machine's own best copy and matrix product leave possible (benchmarks/floors.py).
Before anything is timed, both sides must agree in float32.
"""

import gc
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.checkpoints import make
from benchmarks.measure import (
    Times,
    alternate,
    copy_bandwidth,
    machine,
    matmul_rate,
    pin,
    plot,
    print_table,
    spread,
    write_json,
)
from benchmarks.models import PRESETS
from benchmarks.torch_cases import STAGES, Bench, Case
from benchmarks.torch_side import TorchSide
from ovis_jax import load

DTYPES = ("float32", "bfloat16")


def measured(bench: Bench, case: Case, bandwidth: float, flop_rate: float) -> dict[str, Any]:
    """Time a case; one row of the result."""
    times = alternate({"ours": case.ours, "torch": case.theirs}, bench.repeats)
    ours, theirs = (
        Times(tuple(s / case.steps for s in times[side].seconds)) for side in ("ours", "torch")
    )
    rounds = [t / o for t, o in zip(theirs.seconds, ours.seconds, strict=True)]
    return {
        "stage": case.stage,
        "dtype": bench.dtype,
        "batch": case.batch,
        "positions": case.positions,
        "ratio": theirs.median / ours.median,
        "ratio_lowest": min(rounds),
        "ratio_highest": max(rounds),
        "ours": ours.to_json(),
        "torch": theirs.to_json(),
        "floor_seconds": case.work.seconds(bandwidth, flop_rate),
        **case.note,
    }


def name(row: dict[str, Any]) -> str:
    """What a row measures, in few words."""
    positions = f" {row['positions']}" if row["stage"] in ("prefill", "decode") else ""
    return f"{row['stage']}{positions} x {row['batch']}"


def report(rows: list[dict[str, Any]], title: str) -> None:
    """Print all rows."""
    print_table(
        title,
        ["stage", "dtype", "ours ms", "PyTorch ms", "ratio", "in a round", "floor ms"],
        [
            [
                name(row),
                row["dtype"],
                spread(row["ours"]),
                spread(row["torch"]),
                f"{row['ratio']:.2f}",
                f"{row['ratio_lowest']:.2f}-{row['ratio_highest']:.2f}",
                f"{row['floor_seconds'] * 1e3:.4g}",
            ]
            for row in rows
        ],
    )


def chosen(given: list[str] | None, known: tuple[str, ...], what: str) -> list[str]:
    """What the caller asks for, or all that there is."""
    for one in given or []:
        if one not in known:
            raise SystemExit(f"{what} {one} is not one of {', '.join(known)}")
    return [one for one in known if not given or one in given]


def main(
    model: Annotated[Path | None, typer.Option(help="A checkpoint in the Hub's layout.")] = None,
    preset: Annotated[str, typer.Option(help="Random weights: " + ", ".join(PRESETS))] = "bench",
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="One of " + ", ".join(STAGES))] = None,
    crops: Annotated[list[int] | None, typer.Option(help="Of the vision stages.")] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Prompts; decode takes the first.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Rows of decode.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens of a request, and of a timing.")] = 32,
    repeats: Annotated[int, typer.Option(help="Rounds that count.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Cores of each side; None for all.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw the ratios here.")] = None,
) -> None:
    """Measure every stage of both sides in turn."""
    threads = pin(threads)
    dtypes, stages = chosen(dtype, DTYPES, "dtype"), chosen(stage, STAGES, "stage")
    rows: list[dict[str, Any]] = []
    facts = {"model": str(model or preset), "threads": threads}
    with tempfile.TemporaryDirectory() as temporary:
        # What the processes of cold requests inherit.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{temporary}/compiled")
        os.environ |= {
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
        }
        if model is None:
            folders = make(PRESETS[preset](), Path(temporary), {"float32", *dtypes})
        else:
            folders = {one: model for one in dtypes} | {"float32": model}

        def both(one: str) -> Bench:
            folder = folders[one]
            theirs = TorchSide(folder, one, threads)
            ours = load(folder, dtype=one)
            return Bench(folder, Path(temporary), one, threads, repeats, ours, theirs, new_tokens)

        bench = both("float32")
        facts["logits_apart"] = bench.check()
        bandwidth = facts["copy_bytes_per_second"] = copy_bandwidth()
        for one in dtypes:
            if one != bench.dtype:
                del bench
                gc.collect()
                bench = both(one)
            rates = {"jax": matmul_rate(one), "torch": bench.theirs.matmul_rate()}
            facts[f"matmul_flops_{one}"] = rates
            for case in bench.cases(
                stages, crops or [1, 2], length or [300, 2000], batch or [1, 8]
            ):
                rows.append(measured(bench, case, bandwidth, max(rates.values())))
                Console(stderr=True).print(f"{name(rows[-1])} {one}: {rows[-1]['ratio']:.2f}")
                if output is not None:
                    write_json(output, machine=machine(**facts), rows=rows)
    report(rows, f"{model or preset}, {threads} thread(s) a side, {repeats} rounds")
    if picture is not None:
        labels = list(dict.fromkeys(name(row) for row in rows))
        found = {one: {name(r): r["ratio"] for r in rows if r["dtype"] == one} for one in dtypes}
        series = {one: [ratios[label] for label in labels] for one, ratios in found.items()}
        plot(picture, "PyTorch's time over ours", labels, series, "times", level=1.0)


if __name__ == "__main__":
    typer.run(main)
