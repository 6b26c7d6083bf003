"""What may be wrong with a checkpoint or a disk: how the command tells it, and goes on then."""

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
from ovis_jax.checkpoint.journal import JOURNAL_FILE
from ovis_jax.checkpoint.writer import tensor_bytes
from ovis_jax.sharding import param_shapes

SOURCE = GOLDEN / "tiny-bf16-sharded"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "model.safetensors.index.json"
NORM = "llm.model.norm.weight"


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the sharded checkpoint, of the same name."""
    return copy_golden(SOURCE.name, tmp_path / "in" / SOURCE.name)


def edit_bytes(path: Path, change: Callable[[bytearray], object]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def edit_header(path: Path, change: Callable[[dict], object]) -> None:
    """Change what a header says, and leave the data where it is."""
    content = path.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:stop])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[stop:])


def keys_of(header: dict) -> list[str]:
    """The tensors of a header by their place."""
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
        told.extend([second, "overlapping data", f"start {start + 2}", f"start {start}"])

    told = [SHARDS[0]]
    edit_header(folder / SHARDS[0], overlap)
    return told


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
    return ["../../x", "refused file", "a file inside the folder"]


def leads_out_by_link(folder: Path) -> list[str]:
    (folder / SHARDS[0]).rename(folder.parent / "elsewhere")
    (folder / SHARDS[0]).symlink_to(folder.parent / "elsewhere")
    return [SHARDS[0], "refused file", "a file inside the folder", "a path that leaves it"]


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
        leads_out_by_link,
    ],
)
def test_a_source_that_is_wrong(run, source, tmp_path, alone, spoil):
    told = spoil(source)
    spoiled = read_files(source)
    ended = run(source, tmp_path / "out")
    assert ended.code == 1
    summary, *rows = [line for line in ended.said.splitlines() if line]
    assert summary.startswith(f"error: {source}: ") and summary.endswith(
        "fetch or write the checkpoint again"
    )
    assert any(all(word in row for word in told) for row in rows), (told, rows)
    # Nothing is written, nothing is lost, and with the right files it goes well.
    assert not list(tmp_path.glob("out*")) and read_files(source) == spoiled
    shutil.rmtree(source)
    copy_golden(SOURCE.name, source)
    assert run(source, tmp_path / "out").code == 0
    assert read_files(tmp_path / "out") == alone


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("read error", 3, "error: Input/output error: {shard}"),
        ("touch", 1, "error: {shard} has changed while it was read; see that nothing writes to it"),
    ],
)
def test_a_source_that_fails_while_it_is_read(run, source, tmp_path, alone, what, code, message):
    before = read_files(source)
    ended = run(source, tmp_path / "out", at=("vte.weight", what))
    assert ended.code == code and len(ended.said.splitlines()) == 1
    assert ended.said.startswith(message.format(shard=shard_with(source, "vte.weight")))
    assert not (tmp_path / "out").exists() and read_files(source) == before
    # What was read without an error is kept; what may be a mixture of two files is not.
    assert (tmp_path / "out.partial").exists() == (what == "read error")
    assert run(source, tmp_path / "out").code == 0
    assert read_files(tmp_path / "out") == alone


@contextmanager
def full_disk(folder: Path, size: int) -> Iterator[bool]:
    """A disk of its own of that size, where it may be mounted; says whether."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    can = shutil.which("mount") is not None
    mounted = can and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full(run, tmp_path, alone):
    """It has room for all tensors, but not for headers; or else no file may grow beyond a size."""
    shapes = param_shapes(presets.tiny()).values()
    size = -(-sum(tensor_bytes("BF16", shape) for shape in shapes) // 4096) * 4096
    disk, limit = tmp_path / "disk", ("limit", "200000")
    with full_disk(disk, size) as mounted:
        ended = run(SOURCE, disk / "out", at=None if mounted else limit)
        said = "No space left on device" if mounted else "File too large"
        assert ended.code == 3 and said in ended.said and len(ended.said.splitlines()) == 1
        assert f"{disk / 'out.partial'}/" in ended.said and "None" not in ended.said
        assert [path.name for path in disk.iterdir()] == ["out.partial"]
        # What was written is kept.
        kept = read_files(disk / "out.partial")
        assert SHARDS[0] in kept and all(
            alone[name].startswith(x) for name, x in kept.items() if name != JOURNAL_FILE
        )
        if mounted:
            again = ["mount", "-o", f"remount,size={10 * size}", str(disk)]
            subprocess.run(again, check=True)
        assert run(SOURCE, disk / "out").code == 0
        assert read_files(disk / "out") == alone
