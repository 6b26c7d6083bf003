"""Invalid sources and full disks: the error that the command prints, and how it resumes."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from golden_copies import GOLDEN, copy_golden, read_files, rewrite_shard, shard_with

from ovis_jax import presets
from ovis_jax.checkpoint.safetensors_writer import count_bytes
from ovis_jax.sharding import param_shapes

SOURCE = GOLDEN / "tiny-bf16-sharded"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "model.safetensors.index.json"
NORM = "llm.model.norm.weight"


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the sharded checkpoint, with the same name."""
    return copy_golden(SOURCE.name, tmp_path / "in" / SOURCE.name)


def edit_bytes(path: Path, change: Callable[[bytearray], object]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def edit_header(path: Path, change: Callable[[dict], object]) -> None:
    """Change a header and keep the data."""
    content = path.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:stop])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[stop:])


def keys_of(header: dict) -> list[str]:
    """The tensors of a header in the order of their data."""
    tensors = [key for key in header if key != "__metadata__"]
    return sorted(tensors, key=lambda key: header[key]["data_offsets"])


def long_header(folder: Path) -> list[str]:
    edit_bytes(
        folder / SHARDS[0], lambda x: x.__setitem__(slice(8), (1 << 60).to_bytes(8, "little"))
    )
    return [SHARDS[0], "header length", "at most 100000000 bytes", f"{1 << 60} bytes"]


def flipped_brace(folder: Path) -> list[str]:
    edit_bytes(folder / SHARDS[1], lambda x: x.__setitem__(8, x[8] ^ 1))
    return [SHARDS[1], "(whole file)", "header", "JSON"]


def flipped_digit(folder: Path) -> list[str]:
    shard = shard_with(folder, NORM)
    found = shard.read_bytes().index(b'"' + NORM.encode() + b'"')
    place = shard.read_bytes().index(b'"shape":[', found) + len(b'"shape":[')
    edit_bytes(shard, lambda x: x.__setitem__(place, x[place] ^ 1))
    return [shard.name, NORM, "data offsets", "bytes for BF16 [74]", "holding 128 bytes"]


def overlapping(folder: Path) -> list[str]:
    def overlap(header: dict) -> None:
        first, second = keys_of(header)[:2]
        size = np.diff(header[second]["data_offsets"]).item()
        start = header[first]["data_offsets"][1] - 2
        header[second]["data_offsets"] = [start, start + size]
        expected.extend([second, "overlapping data", f"start {start + 2}", f"start {start}"])

    expected = [SHARDS[0]]
    edit_header(folder / SHARDS[0], overlap)
    return expected


def out_of_range(folder: Path) -> list[str]:
    def move(header: dict) -> None:
        last = keys_of(header)[-1]
        size = np.diff(header[last]["data_offsets"]).item()
        header[last]["data_offsets"] = [1 << 60, (1 << 60) + size]

    edit_header(folder / SHARDS[2], move)
    size = (folder / SHARDS[2]).stat().st_size
    return [SHARDS[2], "truncated file", str(1 << 60)[:6], f"{size} bytes"]


def short_by_a_byte(folder: Path) -> list[str]:
    edit_bytes(folder / SHARDS[1], lambda x: x.pop())
    size = (folder / SHARDS[1]).stat().st_size
    return [SHARDS[1], "truncated file", f"{size + 1} bytes", f"{size} bytes"]


def in_two_shards(folder: Path) -> list[str]:
    other = next(name for name in SHARDS if name != shard_with(folder, NORM).name)
    rewrite_shard(folder / other, {NORM: np.zeros(64, ml_dtypes.bfloat16)})
    return [other, shard_with(folder, NORM).name, NORM, "in two files", "one tensor"]


def leads_out_by_name(folder: Path) -> list[str]:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][NORM] = "../../x"
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "../../x").write_bytes((folder / SHARDS[0]).read_bytes())
    return ["../../x", "rejected file", "a file inside the folder", "a name that leaves it"]


def git_lfs_pointer(folder: Path) -> list[str]:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4be2fe24\nsize 4911635952\n"
    (folder / SHARDS[1]).write_text(pointer)
    return [SHARDS[1], "Git LFS pointer", "the weights", "run `git lfs pull` in its folder"]


@pytest.mark.parametrize(
    "spoil",
    [
        long_header,
        flipped_brace,
        flipped_digit,
        overlapping,
        out_of_range,
        short_by_a_byte,
        in_two_shards,
        leads_out_by_name,
        git_lfs_pointer,
    ],
)
def test_invalid_source(run, source, tmp_path, expected_files, spoil):
    expected = spoil(source)
    spoiled = read_files(source)
    result = run(source, tmp_path / "out")
    assert result.code == 1
    summary, *rows = [line for line in result.output.splitlines() if line]
    assert summary.startswith(f"error: {source}: ") and summary.endswith(
        "download or write the checkpoint again"
    )
    assert any(all(word in row for word in expected) for row in rows), (expected, rows)
    # Nothing is written, nothing is lost, and the right files can be converted.
    assert not list(tmp_path.glob("out*")) and read_files(source) == spoiled
    shutil.rmtree(source)
    copy_golden(SOURCE.name, source)
    assert run(source, tmp_path / "out").code == 0
    assert read_files(tmp_path / "out") == expected_files


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("read error", 3, "error: Input/output error: {shard}"),
        (
            "touch",
            1,
            "error: {shard} has changed while it was read; make sure that nothing writes to it",
        ),
    ],
)
def test_fault_while_reading(run, source, tmp_path, expected_files, fault, code, message):
    before = read_files(source)
    result = run(source, tmp_path / "out", fault=("vte.weight", fault))
    assert result.code == code and len(result.output.splitlines()) == 1
    assert result.output.startswith(message.format(shard=shard_with(source, "vte.weight")))
    assert not (tmp_path / "out").exists() and read_files(source) == before
    # A read error keeps the finished shards; a changed source does not.
    assert (tmp_path / "out.partial").exists() == (fault == "read error")
    assert run(source, tmp_path / "out").code == 0
    assert read_files(tmp_path / "out") == expected_files


@contextmanager
def full_disk(folder: Path, size: int) -> Iterator[bool]:
    """Mount a disk of that size; yields whether that is possible."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    has_mount = shutil.which("mount") is not None
    mounted = has_mount and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(run, tmp_path, expected_files):
    """The disk has room for all tensors but not for headers, or the size of files is limited."""
    shapes = param_shapes(presets.tiny()).values()
    pages = sum(count_bytes("BF16", shape) for shape in shapes) // 4096 + 3
    size = 4096 * pages
    disk, limit = tmp_path / "disk", ("file size limit", "200000")
    with full_disk(disk, size) as mounted:
        result = run(SOURCE, disk / "out", fault=None if mounted else limit)
        message = "No space left on device" if mounted else "File too large"
        assert (
            result.code == 3 and message in result.output and len(result.output.splitlines()) == 1
        )
        assert f"{disk / 'out.partial'}/" in result.output and "None" not in result.output
        assert [path.name for path in disk.iterdir()] == ["out.partial"]
        kept = {*read_files(disk / "out.partial/files")} & set(SHARDS)
        assert SHARDS[0] in kept
        if mounted:
            again = ["mount", "-o", f"remount,size={10 * size}", str(disk)]
            subprocess.run(again, check=True)
        assert run(SOURCE, disk / "out").code == 0
        assert read_files(disk / "out") == expected_files
