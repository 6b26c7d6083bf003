"""The output of the compile-time benchmark."""

import json

import jax
import pytest
import typer

from benchmarks import compile_time
from ovis_jax import Bucket


@pytest.mark.exhaustive
def test_cold_and_warm(small, tmp_path):
    folder = jax.config.jax_compilation_cache_dir
    json_path, plot_path = tmp_path / "results.json", tmp_path / "plot.png"
    compile_time.main(
        dtype="float32",
        bucket=["1x12x1"],
        max_new_tokens=3,
        json_path=json_path,
        plot_path=plot_path,
    )
    results = json.loads(json_path.read_text())
    (row,) = results["rows"]
    assert (row["rows"], row["length"], row["crops"]) == (1, 12, 1)
    assert row["programs"] >= 3 and row["bytes"] > 2**12  # generate, first chunk, next chunks
    assert min(row["warm_seconds"], row["cold_seconds"]) > 0
    assert plot_path.read_bytes().startswith(b"\x89PNG")
    assert jax.config.jax_compilation_cache_dir == folder


def test_parse_bucket():
    assert compile_time.parse_bucket("4x512x8") == Bucket(4, 512, 8)
    with pytest.raises(typer.BadParameter, match="'4x512': .*such as 1x512x2"):
        compile_time.parse_bucket("4x512")
