"""How long does the first token take, stage by stage, and how fast do the next tokens follow?

`python -m benchmarks.generation_speed --model FOLDER`, or `--preset tiny` with random weights. The
stages take turns, and everything is compiled beforehand. `preprocess` turns PIL images (one per
crop) and text into arrays; without a checkpoint, it turns only the images into arrays. `vision`
turns pixels into visual embeddings. `prefill` processes text prompts of the same length.
`first_token` is the complete path. A step must read at least all weights and the cache; its
bandwidth share is the rate at which it does so, relative to the copy bandwidth in the same run.
Compare only figures from the same run, because they depend on the machine and its load.
"""

import resource
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from PIL import Image

from benchmarks.support import machine_peaks
from benchmarks.support.benchmark_model import (
    BenchmarkDtypeOption,
    BenchmarkModel,
    CheckpointOption,
    PresetOption,
    load_or_init_model,
)
from benchmarks.support.random_inputs import random_inputs
from benchmarks.support.results import (
    JsonOption,
    PlotOption,
    plot_results,
    print_results,
    write_results,
)
from benchmarks.support.stage_costs import decode_cost
from benchmarks.support.timing import Timings, time_in_turns
from ovis_jax import generate
from ovis_jax.inputs.image_processing import ImageProcessorConfig, preprocess_image

IMAGE_SIZE = (640, 480)


def prepare_preprocessing(
    benchmark_model: BenchmarkModel, batch_size: int, images_per_row: int
) -> Callable[[], Any]:
    """Return a function that preprocesses a batch of random images of one crop each."""
    noise = np.random.default_rng(0).integers(0, 256, (*IMAGE_SIZE[::-1], 3), np.uint8)
    images = [[Image.fromarray(noise)] * images_per_row for _ in range(batch_size)]
    processor = benchmark_model.processor
    if processor is not None:
        texts = ["Describe the image."] * batch_size
        return lambda: processor(texts, images, max_partition=1)
    half = (0.5, 0.5, 0.5)
    side = benchmark_model.model.config.vision.image_size
    settings = ImageProcessorConfig(side, half, half, 1 / 255)
    return lambda: [preprocess_image(image, settings, 1)[0] for row in images for image in row]


def peak_memory() -> dict[str, Any]:
    """Return the peak bytes so far of the first device, or of the process if it has no counter."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"bytes": stats["peak_bytes_in_use"], "of": "device"}
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "of": "process"}


def time_requests_of_shape(
    benchmark_model: BenchmarkModel,
    dtype: str,
    batch_size: int,
    length: int,
    crops_per_row: int,
    new_tokens: int,
    repeats: int,
    bandwidth: float,
) -> dict[str, Any]:
    """Time the stages of requests of one shape; return one row of the results.

    Args:
      benchmark_model: model and parameters.
      dtype: dtype of the parameters.
      batch_size: number of rows.
      length: prompt length in positions.
      crops_per_row: number of crops per row.
      new_tokens: number of tokens generated after the first.
      repeats: number of timed rounds.
      bandwidth: bytes per second of a copy on this machine.
    """
    model, params = benchmark_model.model, benchmark_model.params
    inputs = random_inputs(model.config, batch_size, length, crops_per_row)
    length = inputs.tokens.shape[1]
    text = random_inputs(model.config, batch_size, length, 0)
    prefill, embed = jax.jit(model.prefill, static_argnums=2), jax.jit(model.embed_images)
    calls: dict[str, Callable[[], Any]] = {
        "preprocess": prepare_preprocessing(benchmark_model, batch_size, crops_per_row),
        "vision": lambda: embed(params, inputs.pixels),
        "prefill": lambda: prefill(params, text, length + 1),
        "first": lambda: generate(model, params, inputs, max_new_tokens=1, eos_ids=()),
        "all": lambda: generate(model, params, inputs, max_new_tokens=new_tokens + 1, eos_ids=()),
    }
    if not crops_per_row:
        del calls["vision"]
    timings = time_in_turns(calls, repeats)
    first = [
        a + b for a, b in zip(timings["preprocess"].seconds, timings["first"].seconds, strict=True)
    ]
    steps = [
        max(total - one, 1e-9) / new_tokens
        for total, one in zip(timings["all"].seconds, timings["first"].seconds, strict=True)
    ]
    step = Timings(tuple(steps))
    # The mean cost of a step is that in the middle of the answer.
    itemsize = jnp.dtype(dtype).itemsize
    cost = decode_cost(model.config, batch_size, length + new_tokens // 2, itemsize)
    return {
        "batch": batch_size,
        "positions": length,
        "crops": crops_per_row,
        "first_token": Timings(tuple(first)).to_json(),
        "preprocess": timings["preprocess"].to_json(),
        "vision": timings["vision"].to_json() if crops_per_row else None,
        "prefill": timings["prefill"].to_json(),
        "step": step.to_json(),
        "tokens_per_second": batch_size / step.median,
        "step_bytes": cost.bytes,
        "bandwidth_share": cost.bytes / step.median / bandwidth,
        "peak_memory": peak_memory(),
    }


def main(
    model: CheckpointOption = None,
    preset: PresetOption = "tiny",
    dtype: BenchmarkDtypeOption = "bfloat16",
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size in rows; may be repeated.")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(min=1, help="Prompt length; may be repeated.")
    ] = None,
    crops: Annotated[int, typer.Option(min=0, help="Number of crops per row.")] = 1,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Number of tokens generated after the first.")
    ] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed rounds.")] = 5,
    json_path: JsonOption = None,
    plot_path: PlotOption = None,
) -> None:
    """Time the stages of `generate`."""
    benchmark_model = load_or_init_model(model, preset, dtype)
    bandwidth = machine_peaks.copy_bandwidth()
    rows = [
        time_requests_of_shape(benchmark_model, dtype, b, n, crops, new_tokens, repeats, bandwidth)
        for n in length or [256]
        for b in batch or [1, 4]
    ]
    stages = ("preprocess", "vision", "prefill", "first_token", "step")
    name = benchmark_model.name
    print_results(
        f"{name}, {dtype}, {crops} crop(s) per row, {jax.devices()[0].device_kind}; copy bandwidth"
        f" {bandwidth / 1e9:.1f} GB/s; times in ms",
        ["rows x positions", *stages, "tokens/s", "of bandwidth", "peak MiB"],
        [
            (
                f"{r['batch']} x {r['positions']}",
                *(1e3 * r[stage]["median"] if r[stage] else "-" for stage in stages),
                r["tokens_per_second"],
                f"{r['bandwidth_share']:.1%}",
                f"{r['peak_memory']['bytes'] / 2**20:.0f}",
            )
            for r in rows
        ],
    )
    write_results(
        json_path,
        name=name,
        dtype=dtype,
        new_tokens=new_tokens,
        copy_bytes_per_second=bandwidth,
        rows=rows,
    )
    if plot_path is not None:
        labels = [f"{r['batch']} x {r['positions']}" for r in rows]
        series = {
            stage: [1e3 * r[stage]["median"] if r[stage] else 0.0 for r in rows] for stage in stages
        }
        plot_results(plot_path, f"{name}: generate, by rows x positions", labels, series, "ms")


if __name__ == "__main__":
    typer.run(main)
