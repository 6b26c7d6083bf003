"""How long does a bucket take to compile, cold and with the persistent cache warm?

`python -m benchmarks.compile --model FOLDER` or `--preset tiny` with random weights. Cold: none of
the bucket's programs is kept anywhere. Warm: they are on disk and JAX's memory is empty, as in the
next process; what is left is tracing, lowering and reading. Both are `ovis_jax.warmup` for
`generate` and `stream`.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import measure
from benchmarks.models import Checkpoint, Dtype, Measured, Preset, open_model
from ovis_jax import Bucket, warmup


def parse(text: str) -> Bucket:
    """Read ROWSxPOSITIONSxCROPS."""
    try:
        rows, length, crops = map(int, text.split("x"))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}, expected such as 1x512x2") from error
    return Bucket(rows, length, crops)


def compile_seconds(
    measured: Measured, buckets: Sequence[Bucket], new_tokens: int, chunk: int
) -> list[dict[str, Any]]:
    """Seconds, programs and their bytes on disk, bucket by bucket."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    rows = []
    try:
        for bucket in buckets:
            with tempfile.TemporaryDirectory() as folder:
                for name, value in zip(names, (folder, 0.0, 0), strict=True):
                    jax.config.update(name, value)
                compilation_cache.reset_cache()  # it keeps the folder of its first use
                seconds = {}
                for state in ("cold", "warm"):
                    jax.clear_caches()
                    found = warmup(
                        measured.model,
                        measured.params,
                        [bucket],
                        max_new_tokens=new_tokens,
                        chunk=chunk,
                    )
                    seconds[state] = found[0].seconds
                files = [path for path in Path(folder).iterdir() if path.name.endswith("-cache")]
                sizes = [path.stat().st_size for path in files]
            rows.append(
                bucket._asdict()
                | {f"{state}_seconds": value for state, value in seconds.items()}
                | {"programs": len(sizes), "bytes": sum(sizes)}
            )
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    return rows


def main(
    model: Checkpoint = None,
    preset: Preset = "tiny",
    dtype: Dtype = "bfloat16",
    bucket: Annotated[
        list[str] | None, typer.Option(help="ROWSxPOSITIONSxCROPS; may be repeated.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="max_new_tokens.")] = 64,
    chunk: Annotated[int, typer.Option(help="Of stream.")] = 1,
    output: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw a PNG here.")] = None,
) -> None:
    """Measure compile seconds a bucket."""
    buckets = [parse(text) for text in bucket or ("1x128x0", "1x512x2", "4x512x8")]
    measured = open_model(model, preset, dtype)
    rows = compile_seconds(measured, buckets, new_tokens, chunk)
    labels = ["x".join(map(str, b)) for b in buckets]
    measure.print_table(
        f"{measured.name}, {dtype}, {new_tokens} new tokens, {jax.devices()[0].device_kind}",
        ["rows x positions x crops", "cold s", "warm s", "programs", "MiB on disk"],
        [
            (label, r["cold_seconds"], r["warm_seconds"], r["programs"], r["bytes"] / 2**20)
            for label, r in zip(labels, rows, strict=True)
        ],
    )
    if output is not None:
        settings = {"name": measured.name, "dtype": dtype, "new_tokens": new_tokens, "chunk": chunk}
        measure.write_json(output, machine=measure.machine(), **settings, rows=rows)
    if picture is not None:
        series = {state: [r[f"{state}_seconds"] for r in rows] for state in ("cold", "warm")}
        measure.plot(picture, f"{measured.name}: compiling", labels, series, "seconds")


if __name__ == "__main__":
    typer.run(main)
