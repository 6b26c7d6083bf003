"""What the benchmark of compiling writes."""

import json

import jax
import pytest
import typer

from benchmarks import compile as benchmark
from ovis_jax import Bucket


def test_cold_and_warm(small, tmp_path):
    folder = jax.config.jax_compilation_cache_dir
    output, picture = tmp_path / "found.json", tmp_path / "found.png"
    benchmark.main(dtype="float32", bucket=["1x12x1"], new_tokens=3, output=output, picture=picture)
    found = json.loads(output.read_text())
    (row,) = found["rows"]
    assert (row["rows"], row["length"], row["crops"]) == (1, 12, 1)
    assert row["programs"] >= 3 and row["bytes"] > 2**12  # generate, first chunk, next chunks
    # Not a matter of this machine's minute: the warm one compiles none of the programs.
    assert 0 < row["warm_seconds"] < row["cold_seconds"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert jax.config.jax_compilation_cache_dir == folder


def test_buckets_are_read():
    assert benchmark.parse("4x512x8") == Bucket(4, 512, 8)
    with pytest.raises(typer.BadParameter, match="expected such as 1x512x2"):
        benchmark.parse("4x512")
