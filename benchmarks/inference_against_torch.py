"""How does inference compare with PyTorch, stage by stage?

`python -m benchmarks.inference_against_torch` measures the preset `bench` with random weights;
`--model` measures a folder in the Hub's layout. Both sides take turns and run the same checkpoint
on the same number of threads. A ratio is PyTorch's time divided by ours: above 1, ovis_jax is
faster. The lower bound ("min ms") is computed from the fastest copy and the fastest matrix
multiplication on this machine (benchmarks/support/stage_costs.py). The results of both sides must
agree in float32 before anything is timed.
"""

import gc
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.support.benchmark_model import PRESETS, PresetOption
from benchmarks.support.machine_peaks import (
    copy_bandwidth,
    matmul_flop_rate,
    restrict_to_cores,
)
from benchmarks.support.random_checkpoints import write_random_checkpoints
from benchmarks.support.results import (
    JsonOption,
    PlotOption,
    plot_results,
    print_results,
    write_results,
)
from benchmarks.support.timing import Timings, format_timing, time_in_turns
from benchmarks.support.torch_comparison import STAGES, StageComparison, TorchComparison
from benchmarks.support.transformers_ovis import TransformersOvis
from ovis_jax import load

COMPARED_DTYPES = ("float32", "bfloat16")


def time_stage(
    comparison: TorchComparison, stage: StageComparison, bandwidth: float, flop_rate: float
) -> dict[str, Any]:
    """Time one stage on both sides; return one row of the results.

    Args:
      comparison: both sides.
      stage: the stage.
      bandwidth: bytes per second of the machine's fastest copy.
      flop_rate: FLOPs per second of its fastest matrix product.
    """
    times = time_in_turns({"ours": stage.run_jax, "torch": stage.run_torch}, comparison.repeats)
    ours, theirs = (
        Timings(tuple(s / stage.steps for s in times[side].seconds)) for side in ("ours", "torch")
    )
    round_ratios = [t / o for t, o in zip(theirs.seconds, ours.seconds, strict=True)]
    return {
        "stage": stage.stage,
        "dtype": comparison.dtype,
        "batch": stage.batch_size,
        "positions": stage.positions,
        "ratio": theirs.median / ours.median,
        "ratio_lowest": min(round_ratios),
        "ratio_highest": max(round_ratios),
        "ours": ours.to_json(),
        "torch": theirs.to_json(),
        "min_seconds": stage.cost.min_seconds(bandwidth, flop_rate),
        **stage.extra_fields,
    }


def row_label(row: dict[str, Any]) -> str:
    """Return a short label of a row, such as "decode 300 x 8"."""
    positions = f" {row['positions']}" if row["stage"] in ("prefill", "decode") else ""
    return f"{row['stage']}{positions} x {row['batch']}"


def print_rows(rows: list[dict[str, Any]], title: str) -> None:
    """Print all rows as a table."""
    print_results(
        title,
        ["stage", "dtype", "ours ms", "PyTorch ms", "ratio", "ratio per round", "min ms"],
        [
            [
                row_label(row),
                row["dtype"],
                format_timing(row["ours"]),
                format_timing(row["torch"]),
                f"{row['ratio']:.2f}",
                f"{row['ratio_lowest']:.2f}-{row['ratio_highest']:.2f}",
                f"{row['min_seconds'] * 1e3:.4g}",
            ]
            for row in rows
        ],
    )


def select_known(requested: list[str] | None, known: tuple[str, ...], noun: str) -> list[str]:
    """Return the requested names in the order of `known`; all if none are requested."""
    for name in requested or []:
        if name not in known:
            raise SystemExit(f"{noun} {name!r} is unknown; use one of {', '.join(known)}")
    return [name for name in known if not requested or name in requested]


def main(
    model: Annotated[
        Path | None, typer.Option(help="Checkpoint folder in the Hub's layout.")
    ] = None,
    preset: PresetOption = "bench",
    dtype: Annotated[
        list[str] | None, typer.Option(help="Dtype to measure; may be repeated.")
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help=f"Stage to measure; may be repeated. One of {', '.join(STAGES)}."),
    ] = None,
    crops: Annotated[
        list[int] | None, typer.Option(help="Number of crops in the vision stages; repeatable.")
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(help="Prompt length in positions; repeatable. Decode uses the first."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Batch size of decode; may be repeated.")
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(help="Number of tokens per request, and per measurement of decode.")
    ] = 32,
    repeats: Annotated[int, typer.Option(help="Number of timed rounds.")] = 5,
    threads: Annotated[
        int | None, typer.Option(help="Number of threads per side; all cores by default.")
    ] = None,
    json_path: JsonOption = None,
    plot_path: PlotOption = None,
) -> None:
    """Time every stage in ovis_jax and in PyTorch, in turn."""
    threads = restrict_to_cores(threads)
    dtypes = select_known(dtype, COMPARED_DTYPES, "dtype")
    stages = select_known(stage, STAGES, "stage")
    rows: list[dict[str, Any]] = []
    facts = {"model": str(model or preset), "threads": threads}
    with tempfile.TemporaryDirectory() as temporary:
        # The processes of cold requests inherit these variables.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{temporary}/compiled")
        os.environ |= {
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
        }
        if model is None:
            folders = write_random_checkpoints(
                PRESETS[preset](), Path(temporary), {"float32", *dtypes}
            )
        else:
            folders = {one: model for one in dtypes} | {"float32": model}

        def load_both(one: str) -> TorchComparison:
            folder = folders[one]
            return TorchComparison(
                folder,
                Path(temporary),
                one,
                threads,
                repeats,
                torch_side=TransformersOvis(folder, one, threads),
                jax_side=load(folder, dtype=one),
                new_tokens=new_tokens,
            )

        comparison = load_both("float32")
        facts["logits_apart"] = comparison.check_agreement()
        bandwidth = facts["copy_bytes_per_second"] = copy_bandwidth()
        for one in dtypes:
            if one != comparison.dtype:
                del comparison
                gc.collect()
                comparison = load_both(one)
            rates = {
                "jax": matmul_flop_rate(one),
                "torch": comparison.torch_side.matmul_flop_rate(),
            }
            facts[f"matmul_flops_{one}"] = rates
            for prepared in comparison.prepare_stages(
                stages, crops or [1, 2], length or [300, 2000], batch or [1, 8]
            ):
                rows.append(time_stage(comparison, prepared, bandwidth, max(rates.values())))
                label, ratio = row_label(rows[-1]), rows[-1]["ratio"]
                Console(stderr=True).print(f"{label} {one}: {ratio:.2f}")
                write_results(json_path, facts, rows=rows)
    print_rows(rows, f"{model or preset}, {threads} thread(s) per side, {repeats} rounds")
    if plot_path is not None:
        labels = list(dict.fromkeys(map(row_label, rows)))
        ratios = {
            one: {row_label(r): r["ratio"] for r in rows if r["dtype"] == one} for one in dtypes
        }
        series = {one: [ratios[one][label] for label in labels] for one in dtypes}
        plot_results(plot_path, "PyTorch's time over ours", labels, series, "ratio", reference=1.0)


if __name__ == "__main__":
    typer.run(main)
