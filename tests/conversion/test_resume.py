"""Conversions that are interrupted and resumed, and what must not change in between."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden_copies import GOLDEN, copy_golden, read_files, read_tensors, shard_with

from ovis_jax.checkpoint import safetensors_reader
from ovis_jax.checkpoint.output_dirs import RESUME_FILE
from ovis_jax.conversion import tensor_chunks
from ovis_jax.conversion.from_hf import convert_from_hf
from ovis_jax.conversion.to_hf import export_to_hf
from ovis_jax.errors import CheckpointError, OvisError

ROOT = Path(__file__).parents[2]
SOURCE = GOLDEN / "tiny-bf16-sharded"


@pytest.fixture
def fail_at(monkeypatch):
    """Make reading a tensor raise an error; returns the list of keys that are read."""

    def fail_at(key: str, error: BaseException | None) -> list[str]:
        read: list[str] = []

        def read_chunks(info, **options):
            read.append(info.key)
            if info.key == key and error is not None:
                raise error
            yield from safetensors_reader.read_chunks(info, **options)

        monkeypatch.setattr(tensor_chunks, "read_chunks", read_chunks)
        return read

    return fail_at


def finished_keys(partial_folder: Path) -> set[str]:
    """The tensors of the finished shards of an unfinished result."""
    names = json.loads((partial_folder / RESUME_FILE).read_text())["finished"]
    headers = [safetensors_reader.read_header(partial_folder / "files" / name) for name in names]
    return {info.key for header in headers for info in header.tensors}


@pytest.mark.exhaustive
def test_killed_at_random_moments(tmp_path):
    command = [sys.executable, "-m", "tests.conversion.kill_conversions", SOURCE, tmp_path]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    counts = json.loads(process.stdout)
    assert counts["killed"] >= 20 and counts["equal results"] == counts["results"] > 1
    assert counts["kept"] > 0 and counts["converted again"] == 0


@pytest.mark.parametrize(
    ("error", "quantization"),
    [
        (OSError(errno.EIO, "Input/output error"), None),
        (KeyboardInterrupt(), None),
        (KeyboardInterrupt(), "int8"),
        (KeyboardInterrupt(), "int4"),
    ],
)
def test_finished_shards_are_kept(tmp_path, fail_at, error, quantization):
    convert_from_hf(SOURCE, tmp_path / "expected", quantization=quantization)
    fail_at("vte.weight", error)
    with pytest.raises(type(error)):
        convert_from_hf(SOURCE, tmp_path / "out", quantization=quantization)
    kept = finished_keys(tmp_path / "out.partial")
    assert not (tmp_path / "out").exists() and len(kept) > 10
    read, progress = fail_at("", None), []
    convert_from_hf(
        SOURCE,
        tmp_path / "out",
        quantization=quantization,
        progress=lambda *call: progress.append(call[1:]),
    )
    converted = read_tensors(tmp_path / "out").keys() - kept
    assert "visual_embedding" in converted and len(read) == len(converted)
    assert progress[-1][0] == progress[-1][1] and progress == sorted(progress)
    assert read_files(tmp_path / "out") == read_files(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


def test_export_keeps_finished_shards_too(tmp_path, fail_at):
    options = {"max_shard_bytes": 150_000}
    convert_from_hf(SOURCE, tmp_path / "own")
    export_to_hf(tmp_path / "own", tmp_path / "expected", **options)
    fail_at("decoder/block_3/mlp/up", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        export_to_hf(tmp_path / "own", tmp_path / "out", **options)
    kept, read = finished_keys(tmp_path / "out.partial"), fail_at("", None)
    export_to_hf(tmp_path / "own", tmp_path / "out", **options)
    assert "decoder/block_3/mlp/up" in read and len(read) == 85 - len(kept) and kept
    assert read_files(tmp_path / "out") == read_files(tmp_path / "expected")


def test_other_options_do_not_resume(tmp_path, fail_at):
    fail_at("vte.weight", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        convert_from_hf(SOURCE, tmp_path / "out")
    before = read_files(tmp_path / "out.partial/files")
    message = r"out\.partial was started with different inputs: tensors and options; use"
    for options in ({"dtype": "float32"}, {"quantization": "int8"}):
        with pytest.raises(OvisError, match=message):
            convert_from_hf(SOURCE, tmp_path / "out", **options)
    assert read_files(tmp_path / "out.partial/files") == before


def test_source_that_changes(tmp_path):
    source = copy_golden("tiny-bf16-sharded", tmp_path / "source")
    shard = shard_with(source, "vte.weight")

    def touch(_: str, done: int, total: int) -> None:
        os.utime(shard, ns=(done, done))

    with pytest.raises(CheckpointError, match=f"{shard.name} has changed while it was read"):
        convert_from_hf(source, tmp_path / "out", progress=touch)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert_from_hf(source, tmp_path / "out")
    assert len(read_tensors(tmp_path / "out")) == 85


def test_resume_without_checksums(tmp_path, fail_at):
    fail_at("vte.weight", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        convert_from_hf(SOURCE, tmp_path / "out", checksums=False)
    fail_at("", None)
    assert convert_from_hf(SOURCE, tmp_path / "out", checksums=False)["sha256"] == {}
    convert_from_hf(SOURCE, tmp_path / "expected")
    found, expected = read_files(tmp_path / "out"), read_files(tmp_path / "expected")
    record, expected_record = (json.loads(x.pop("conversion.json")) for x in (found, expected))
    assert found == expected and record == expected_record | {"sha256": {}}
