"""How long does a crop take, and how much of the machine does that use?

`python -m benchmarks.vision --model FOLDER` or `--preset tiny` with random weights: pixels through
the vision encoder and the visual tokenizer to visual embeddings, for several numbers of crops. The
FLOP counted are those of the matrix products; their share is of the fastest square matrix product
measured in the same run.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer

from benchmarks import floors, measure
from benchmarks.models import Checkpoint, Dtype, Measured, Preset, open_model


def vision(
    measured: Measured, counts: Sequence[int], dtype: str, repeats: int, flop_rate: float
) -> list[dict[str, Any]]:
    """Times, FLOP share and memory by number of crops; the counts take turns."""
    config, itemsize = measured.model.config, jnp.dtype(dtype).itemsize
    side, channels = config.vision.image_size, config.vision.num_channels
    embed = jax.jit(measured.model.embed_crops)
    compiled, calls = {}, {}
    for crops in counts:
        pixels = jax.random.normal(jax.random.key(0), (crops, side, side, channels))
        compiled[crops] = embed.lower(measured.params, pixels).compile()
        calls[str(crops)] = _call(compiled[crops], measured.params, pixels)
    times = measure.alternate(calls, repeats)
    rows = []
    for crops in counts:
        seconds = times[str(crops)]
        work = floors.vision(config, crops, itemsize)
        work += floors.visual_tokens(config, crops, itemsize)
        rows.append(
            {
                "crops": crops,
                "seconds": seconds.to_json(),
                "ms_per_crop": 1e3 * seconds.median / crops,
                "flops": work.flops,
                "flop_share": work.flops / seconds.median / flop_rate,
                "temp_bytes": compiled[crops].memory_analysis().temp_size_in_bytes,
            }
        )
    return rows


def _call(compiled: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: compiled(*arguments)


def main(
    model: Checkpoint = None,
    preset: Preset = "tiny",
    dtype: Dtype = "bfloat16",
    crops: Annotated[
        list[int] | None, typer.Option(min=1, help="May be repeated; 1 to 10 without.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    output: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw a PNG here.")] = None,
) -> None:
    """Measure the way from pixels to visual embeddings, warm."""
    measured = open_model(model, preset, dtype)
    flop_rate = measure.matmul_rate(dtype)
    counts = sorted(set(crops or range(1, 11)))
    rows = vision(measured, counts, dtype, repeats, flop_rate)
    measure.print_table(
        f"{measured.name}, {dtype}, {jax.devices()[0].device_kind}; best matrix product "
        f"{flop_rate / 1e9:.0f} GFLOP/s",
        ["crops", "ms", "spread", "ms a crop", "FLOP share", "temp MiB"],
        [
            (
                r["crops"],
                1e3 * r["seconds"]["median"],
                f"{1e3 * r['seconds']['fastest']:.3g} - {1e3 * r['seconds']['slowest']:.3g}",
                r["ms_per_crop"],
                f"{r['flop_share']:.1%}",
                r["temp_bytes"] / 2**20,
            )
            for r in rows
        ],
    )
    if output is not None:
        settings = {"name": measured.name, "dtype": dtype, "matmul_flops_per_second": flop_rate}
        measure.write_json(output, machine=measure.machine(), **settings, rows=rows)
    if picture is not None:
        series = {"ms a crop": [r["ms_per_crop"] for r in rows]}
        title = f"{measured.name}: vision and visual tokens"
        measure.plot(picture, title, counts, series, "ms", lines=True)


if __name__ == "__main__":
    typer.run(main)
