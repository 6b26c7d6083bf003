"""How long does a bucket take to compile, with a cold and with a warm compilation cache?

`python -m benchmarks.compile_time --model FOLDER`, or `--preset tiny` with random weights. With a
cold cache, none of the bucket's programs is cached. With a warm cache, the programs are on disk but
not in memory, as in a new process. They must then be traced, lowered and read. Both measurements
run `ovis_jax.warmup` for `generate` and `stream`.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from jax.experimental.compilation_cache import compilation_cache

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
from ovis_jax import Bucket, warmup


def parse_bucket(text: str) -> Bucket:
    """Parse ROWSxPOSITIONSxCROPS, such as 1x512x2."""
    try:
        rows, length, crops = map(int, text.split("x"))
    except ValueError as error:
        raise typer.BadParameter(
            f"bucket {text!r}: expected ROWSxPOSITIONSxCROPS, such as 1x512x2"
        ) from error
    return Bucket(rows, length, crops)


def time_compilation(
    benchmark_model: BenchmarkModel, buckets: Sequence[Bucket], max_new_tokens: int, chunk_size: int
) -> list[dict[str, Any]]:
    """Measure the compile time, the number of programs and their bytes on disk of each bucket."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    saved = {name: getattr(jax.config, name) for name in names}
    rows = []
    try:
        for bucket in buckets:
            with tempfile.TemporaryDirectory() as folder:
                for name, value in zip(names, (folder, 0.0, 0), strict=True):
                    jax.config.update(name, value)
                compilation_cache.reset_cache()  # the cache keeps the folder of its first use
                seconds = {}
                for state in ("cold", "warm"):
                    jax.clear_caches()
                    compiled = warmup(
                        benchmark_model.model,
                        benchmark_model.params,
                        [bucket],
                        max_new_tokens=max_new_tokens,
                        chunk_size=chunk_size,
                    )
                    seconds[f"{state}_seconds"] = compiled[0].seconds
                files = [path for path in Path(folder).iterdir() if path.name.endswith("-cache")]
                sizes = [path.stat().st_size for path in files]
            rows.append(bucket._asdict() | seconds | {"programs": len(sizes), "bytes": sum(sizes)})
    finally:
        for name, value in saved.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    return rows


def main(
    model: CheckpointOption = None,
    preset: PresetOption = "tiny",
    dtype: BenchmarkDtypeOption = "bfloat16",
    bucket: Annotated[
        list[str] | None,
        typer.Option(help="Bucket to compile, as ROWSxPOSITIONSxCROPS; may be repeated."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens per answer.")] = 64,
    chunk: Annotated[
        int, typer.Option(help="Number of tokens that `stream` yields at a time.")
    ] = 1,
    json_path: JsonOption = None,
    plot_path: PlotOption = None,
) -> None:
    """Measure the compile time of each bucket."""
    buckets = [parse_bucket(text) for text in bucket or ("1x128x0", "1x512x2", "4x512x8")]
    benchmark_model = load_or_init_model(model, preset, dtype)
    rows = time_compilation(benchmark_model, buckets, max_new_tokens, chunk)
    labels = ["x".join(map(str, b)) for b in buckets]
    name = benchmark_model.name
    print_results(
        f"{name}, {dtype}, {max_new_tokens} new tokens, {jax.devices()[0].device_kind}",
        ["rows x positions x crops", "cold s", "warm s", "programs", "MiB on disk"],
        [
            (label, r["cold_seconds"], r["warm_seconds"], r["programs"], r["bytes"] / 2**20)
            for label, r in zip(labels, rows, strict=True)
        ],
    )
    settings = {"name": name, "dtype": dtype, "new_tokens": max_new_tokens, "chunk": chunk}
    write_results(json_path, **settings, rows=rows)
    if plot_path is not None:
        series = {state: [r[f"{state}_seconds"] for r in rows] for state in ("cold", "warm")}
        plot_results(plot_path, f"{name}: compile time", labels, series, "seconds")


if __name__ == "__main__":
    typer.run(main)
