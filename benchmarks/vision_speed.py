"""How long does a crop take, and how much of the machine's compute does it use?

`python -m benchmarks.vision_speed --model FOLDER`, or `--preset tiny` with random weights. The
benchmark measures the path from pixels through the vision encoder and the visual tokenizer to
visual embeddings, for several numbers of crops. Only the FLOPs of matrix multiplications count.
Their share is relative to the fastest square matrix multiplication in the same run.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer

from benchmarks.support import machine_peaks
from benchmarks.support.benchmark_model import (
    BenchmarkDtypeOption,
    BenchmarkModel,
    CheckpointOption,
    PresetOption,
    load_or_init_model,
)
from benchmarks.support.results import (
    JsonOption,
    PlotOption,
    plot_results,
    print_results,
    write_results,
)
from benchmarks.support.stage_costs import vision_cost, visual_head_cost
from benchmarks.support.timing import format_timing, time_in_turns


def time_vision(
    benchmark_model: BenchmarkModel,
    crop_counts: Sequence[int],
    dtype: str,
    repeats: int,
    flop_rate: float,
) -> list[dict[str, Any]]:
    """Measure time, FLOP share and temporary memory for each number of crops.

    Args:
      benchmark_model: model and parameters.
      crop_counts: numbers of crops; they take turns.
      dtype: dtype of the parameters.
      repeats: number of timed rounds.
      flop_rate: FLOPs per second of the fastest matrix product.
    """
    config, itemsize = benchmark_model.model.config, jnp.dtype(dtype).itemsize
    side, channels = config.vision.image_size, config.vision.num_channels
    embed = jax.jit(benchmark_model.model.embed_images)
    compiled, calls = {}, {}
    for crops in crop_counts:
        pixels = jax.random.normal(jax.random.key(0), (crops, side, side, channels))
        compiled[crops] = embed.lower(benchmark_model.params, pixels).compile()
        calls[str(crops)] = partial(compiled[crops], benchmark_model.params, pixels)
    timings = time_in_turns(calls, repeats)
    rows = []
    for crops in crop_counts:
        timing = timings[str(crops)]
        cost = vision_cost(config, crops, itemsize) + visual_head_cost(config, crops, itemsize)
        rows.append(
            {
                "crops": crops,
                "seconds": timing.to_json(),
                "ms_per_crop": 1e3 * timing.median / crops,
                "flops": cost.flops,
                "flop_share": cost.flops / timing.median / flop_rate,
                "temp_bytes": compiled[crops].memory_analysis().temp_size_in_bytes,
            }
        )
    return rows


def main(
    model: CheckpointOption = None,
    preset: PresetOption = "tiny",
    dtype: BenchmarkDtypeOption = "bfloat16",
    crops: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Number of crops; may be repeated; default: 1 to 10."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed rounds.")] = 5,
    json_path: JsonOption = None,
    plot_path: PlotOption = None,
) -> None:
    """Time the path from pixels to visual embeddings."""
    benchmark_model = load_or_init_model(model, preset, dtype)
    flop_rate = machine_peaks.matmul_flop_rate(dtype)
    crop_counts = sorted(set(crops or range(1, 11)))
    rows = time_vision(benchmark_model, crop_counts, dtype, repeats, flop_rate)
    name = benchmark_model.name
    print_results(
        f"{name}, {dtype}, {jax.devices()[0].device_kind}; fastest matrix product"
        f" {flop_rate / 1e9:.0f} GFLOP/s",
        ["crops", "ms (range)", "ms per crop", "FLOP share", "temp MiB"],
        [
            (
                r["crops"],
                format_timing(r["seconds"]),
                r["ms_per_crop"],
                f"{r['flop_share']:.1%}",
                r["temp_bytes"] / 2**20,
            )
            for r in rows
        ],
    )
    settings = {"name": name, "dtype": dtype, "matmul_flops_per_second": flop_rate}
    write_results(json_path, **settings, rows=rows)
    if plot_path is not None:
        series = {"ms per crop": [r["ms_per_crop"] for r in rows]}
        title = f"{name}: vision encoder and visual tokenizer"
        plot_results(plot_path, title, crop_counts, series, "ms", lines=True)


if __name__ == "__main__":
    typer.run(main)
