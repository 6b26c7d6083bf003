"""How long until the first token, what takes that long, and how many tokens a second after it?

`python -m benchmarks.generate --model FOLDER` or `--preset tiny` with random weights. Stages are
timed apart, in turn, warm: `preprocess` is from PIL images (one a crop) and text to arrays, without
a checkpoint the images alone; `vision` from pixels to visual embeddings; `prefill` reads prompts of
the same length without crops; `first token` is the whole of them. A step's floor is all weights and
the cache over the memory bandwidth that a copy reached in the same run. Times are of this machine
in this minute: compare figures of one run only.
"""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from PIL import Image

from benchmarks import floors, measure
from benchmarks.models import Checkpoint, Dtype, Measured, Preset, open_model, prompts
from ovis_jax import generate
from ovis_jax.inputs.image import ImageSettings
from ovis_jax.inputs.image import crops as cut

PICTURE = (640, 480)


def preprocess(measured: Measured, batch: int, crops: int) -> Callable[[], Any]:
    """A call that makes the arrays of a batch."""
    noise = np.random.default_rng(0).integers(0, 256, (*PICTURE[::-1], 3), np.uint8)
    images = [[Image.fromarray(noise)] * crops for _ in range(batch)]
    processor = measured.processor
    if processor is not None:
        texts = ["Describe the image."] * batch
        return lambda: processor(texts, images, max_partition=1)
    half = (0.5, 0.5, 0.5)
    settings = ImageSettings(measured.model.config.vision.image_size, half, half, 1 / 255)
    return lambda: [cut(image, settings, 1)[0] for row in images for image in row]


def peak_memory() -> dict[str, Any]:
    """The most bytes held so far: by the first device where it counts them, else by the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"bytes": stats["peak_bytes_in_use"], "of": "device"}
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "of": "process"}


def request(
    measured: Measured,
    dtype: str,
    shape: tuple[int, int, int],
    new_tokens: int,
    repeats: int,
    bandwidth: float,
) -> dict[str, Any]:
    """Measure requests of one shape: rows, positions, crops a row."""
    batch, _, crops = shape
    model, params = measured.model, measured.params
    inputs = prompts(model.config, *shape)
    length = inputs.tokens.shape[1]
    text = prompts(model.config, batch, length, 0)
    prefill, embed = jax.jit(model.prefill, static_argnums=2), jax.jit(model.embed_crops)
    calls: dict[str, Callable[[], Any]] = {
        "preprocess": preprocess(measured, batch, crops),
        "vision": lambda: embed(params, inputs.pixels),
        "prefill": lambda: prefill(params, text, length + 1),
        "first": lambda: generate(model, params, inputs, max_new_tokens=1, eos_ids=()),
        "whole": lambda: generate(model, params, inputs, max_new_tokens=new_tokens + 1, eos_ids=()),
    }
    if not crops:
        del calls["vision"]
    times = measure.alternate(calls, repeats)
    first = [
        a + b for a, b in zip(times["preprocess"].seconds, times["first"].seconds, strict=True)
    ]
    steps = [
        max(whole - one, 1e-9) / new_tokens
        for whole, one in zip(times["whole"].seconds, times["first"].seconds, strict=True)
    ]
    step = measure.Times(tuple(steps))
    # In the middle of the answer, when half of its tokens are cached.
    work = floors.decode(model.config, batch, length + new_tokens // 2, jnp.dtype(dtype).itemsize)
    return {
        "batch": batch,
        "positions": length,
        "crops": crops,
        "first_token": measure.Times(tuple(first)).to_json(),
        "preprocess": times["preprocess"].to_json(),
        "vision": times["vision"].to_json() if crops else None,
        "prefill": times["prefill"].to_json(),
        "step": step.to_json(),
        "tokens_per_second": batch / step.median,
        "step_bytes": work.bytes,
        "bandwidth_share": work.bytes / step.median / bandwidth,
        "peak_memory": peak_memory(),
    }


def main(
    model: Checkpoint = None,
    preset: Preset = "tiny",
    dtype: Dtype = "bfloat16",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Rows; may be repeated.")] = None,
    length: Annotated[
        list[int] | None, typer.Option(min=1, help="Prompt positions; may be repeated.")
    ] = None,
    crops: Annotated[int, typer.Option(min=0, help="Crops a row.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="Written after the first.")] = 32,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    output: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw a PNG here.")] = None,
) -> None:
    """Measure `generate` stage by stage, warm."""
    measured = open_model(model, preset, dtype)
    bandwidth = measure.copy_bandwidth()
    rows = [
        request(measured, dtype, (b, n, crops), new_tokens, repeats, bandwidth)
        for n in length or [256]
        for b in batch or [1, 4]
    ]
    names = ("preprocess", "vision", "prefill", "first_token", "step")
    measure.print_table(
        f"{measured.name}, {dtype}, {crops} crop(s) a row, {jax.devices()[0].device_kind}; copies "
        f"reach {bandwidth / 1e9:.1f} GB/s; ms",
        ["rows x positions", *names, "tokens/s", "of bandwidth", "peak MiB"],
        [
            (
                f"{r['batch']} x {r['positions']}",
                *(1e3 * r[name]["median"] if r[name] else "-" for name in names),
                r["tokens_per_second"],
                f"{r['bandwidth_share']:.1%}",
                f"{r['peak_memory']['bytes'] / 2**20:.0f}",
            )
            for r in rows
        ],
    )
    if output is not None:
        settings = {
            "name": measured.name,
            "dtype": dtype,
            "new_tokens": new_tokens,
            "copy_bytes_per_second": bandwidth,
        }
        measure.write_json(output, machine=measure.machine(), **settings, rows=rows)
    if picture is not None:
        labels = [f"{r['batch']} x {r['positions']}" for r in rows]
        series = {
            name: [1e3 * r[name]["median"] if r[name] else 0.0 for r in rows] for name in names
        }
        measure.plot(
            picture, f"{measured.name}: generate, by rows x positions", labels, series, "ms"
        )


if __name__ == "__main__":
    typer.run(main)
