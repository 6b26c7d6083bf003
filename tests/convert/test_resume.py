"""Conversions that are stopped, and everything that may have changed before they go on."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from golden_copies import (
    GOLDEN,
    copy_golden,
    flip_last_bit,
    read_files,
    read_tensors,
    shard_with,
)

from convert import transfer
from convert.from_hf import convert
from convert.to_hf import export
from ovis_jax.checkpoint import checksums, safetensors_files, safetensors_stream
from ovis_jax.checkpoint.journal import JOURNAL_FILE, unfinished
from ovis_jax.checkpoint.problems import CheckpointProblems
from ovis_jax.checkpoint.source import Source
from ovis_jax.errors import CheckpointError, OvisError

ROOT = Path(__file__).parents[2]
SOURCE = GOLDEN / "tiny-bf16-sharded"


@pytest.fixture
def stop(monkeypatch):
    """Let reading a tensor raise an error; gives the keys that were read, to the end."""
    read: list[str] = []

    def stop(key: str, error: BaseException | None) -> list[str]:
        read.clear()
        true = safetensors_files.read_chunks

        def read_chunks(entry, *more):
            if entry.key == key and error is not None:
                raise error
            yield from true(entry, *more)
            read.append(entry.key)

        monkeypatch.setattr(transfer, "read_chunks", read_chunks)
        return read

    monkeypatch.setattr(safetensors_stream, "MARK_BYTES", 1)
    return stop


def test_killed_at_any_moment_it_ends_the_same(tmp_path):
    command = [sys.executable, "-m", "tests.convert.killed", str(SOURCE), str(tmp_path), "60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    equal, kept = map(int, done.stdout.split())
    assert equal == 60 and kept > 0


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_it_goes_on_where_it_stopped(tmp_path, stop, error):
    convert(SOURCE, tmp_path / "alone")
    before = stop("vte.weight", error)
    with pytest.raises(type(error)):
        convert(SOURCE, tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(before) > 10
    first = set(before)
    told = []
    read = stop("vte.weight", None)
    convert(SOURCE, tmp_path / "out", progress=lambda *x: told.append(x[1:]))
    assert "vte.weight" in read and not first & set(read)
    assert told[-1][0] == told[-1][1] and told == sorted(told)
    assert read_files(tmp_path / "out") == read_files(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]


def test_an_export_goes_on_too(tmp_path, stop):
    convert(SOURCE, tmp_path / "own")
    export(tmp_path / "own", tmp_path / "alone")
    first = set(stop("decoder/block_3/mlp/up", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "own", tmp_path / "out")
    read = stop("", None)
    export(tmp_path / "own", tmp_path / "out")
    assert "decoder/block_3/mlp/up" in read and not first & set(read)
    assert read_files(tmp_path / "out") == read_files(tmp_path / "alone")


def test_a_second_converter_is_refused(tmp_path):
    with unfinished(tmp_path / "out", {}):
        with pytest.raises(
            OvisError, match="another process is writing .*out.partial; wait for it"
        ):
            convert(SOURCE, tmp_path / "out")
    assert (tmp_path / "out").is_dir()


def test_a_folder_of_something_else_is_left(tmp_path):
    mine = tmp_path / "out.partial/thesis.tex"
    mine.parent.mkdir()
    mine.write_text("years of work")
    with pytest.raises(OvisError, match=r"out\.partial holds files of something else: .*; move"):
        convert(SOURCE, tmp_path / "out")
    assert mine.read_text() == "years of work" and [*mine.parent.iterdir()] == [mine]
    mine.rename(tmp_path / "thesis.tex")
    convert(SOURCE, tmp_path / "out")  # what is left is empty, as before a first line was written
    assert not mine.parent.exists()


@pytest.mark.parametrize("moment", ["rename", "unlink"])
def test_killed_at_the_very_end(tmp_path, monkeypatch, moment):
    convert(SOURCE, tmp_path / "alone")
    true = getattr(Path, moment)

    def killed(self, *more, **options):
        if self.name.startswith("out.partial") and self.exists():
            raise KeyboardInterrupt
        return true(self, *more, **options)

    monkeypatch.setattr(Path, moment, killed)
    with pytest.raises(KeyboardInterrupt):
        convert(SOURCE, tmp_path / "out")
    monkeypatch.undo()
    if moment == "unlink":
        shutil.rmtree(tmp_path / "out")  # a journal is left beside it, which is then not believed
    convert(SOURCE, tmp_path / "out", dtype="float32" if moment == "unlink" else None)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["alone", "out"]
    same = read_files(tmp_path / "out") == read_files(tmp_path / "alone")
    assert same == (moment == "rename")


def test_killed_while_it_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda _: None)
    with pytest.raises(CheckpointError), unfinished(tmp_path / "out", {}) as (partial, _):
        (partial / "model").touch()
        raise CheckpointError("wrong")
    assert [path.name for path in partial.iterdir()] == [JOURNAL_FILE]
    with unfinished(tmp_path / "out", {}):
        pass


def test_what_was_begun_with_something_else_is_left(tmp_path, stop):
    stop("vte.weight", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        convert(SOURCE, tmp_path / "out")
    partial = read_files(tmp_path / "out.partial")
    with pytest.raises(OvisError, match="other input: not the same are tensors and options; give"):
        convert(SOURCE, tmp_path / "out", dtype="float32")
    assert read_files(tmp_path / "out.partial") == partial and JOURNAL_FILE in partial


def test_a_source_that_changes(tmp_path):
    source = copy_golden("tiny-bf16-sharded", tmp_path / "source")
    shard = shard_with(source, "vte.weight")

    def touch(_: str, done: int, total: int) -> None:
        os.utime(shard, ns=(done, done))

    with pytest.raises(CheckpointError, match=f"{shard.name} has changed while it was read"):
        convert(source, tmp_path / "out", progress=touch)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert(source, tmp_path / "out")
    assert len(read_tensors(tmp_path / "out")) == 85


def test_checksums_of_the_result(tmp_path):
    record = convert(SOURCE, tmp_path / "out")
    command = [sys.executable, "-m", "ovis_jax", "inspect", "--check", str(tmp_path / "out")]
    sound = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert sound.returncode == 0 and "3 file(s) hash to what conversion.json says" in sound.stdout
    shard = min(record["sha256"])
    flip_last_bit(tmp_path / "out" / shard)
    broken = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert broken.returncode == 1 and "wrong sha256" in broken.stderr and shard in broken.stderr


def test_without_checksums(tmp_path, stop):
    stop("vte.weight", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        convert(SOURCE, tmp_path / "out", checksums=False)
    stop("", None)
    assert convert(SOURCE, tmp_path / "out", checksums=False)["sha256"] == {}
    convert(SOURCE, tmp_path / "alone")
    plain, alone = read_files(tmp_path / "out"), read_files(tmp_path / "alone")
    record, expected = (json.loads(x.pop("conversion.json")) for x in (plain, alone))
    assert plain == alone and record == expected | {"sha256": {}}
    with pytest.raises(OvisError, match="has no checksums: convert.from_hf writes them"):
        checksums.recorded(tmp_path / "out")


def test_a_source_is_held_to_what_is_published(tmp_path, monkeypatch):
    digests = {path.name: checksums.sha256(path) for path in SOURCE.glob("*.safetensors")}
    monkeypatch.setattr(checksums, "PUBLISHED", {"AIDC-AI/tiny": digests})
    convert(SOURCE, tmp_path / "out", verify=True)
    source = copy_golden("tiny-bf16-sharded", tmp_path / "source")
    shard = shard_with(source, "vte.weight")
    flip_last_bit(shard)
    with pytest.raises(CheckpointProblems) as caught:
        convert(source, tmp_path / "other", verify=True)
    (problem,) = caught.value.problems
    assert problem.file == shard.name and problem.expected == digests[shard.name]
    assert not (tmp_path / "other.partial").exists()
    with pytest.raises(OvisError, match="no published checksums are known of tiny-f32"):
        convert(GOLDEN / "tiny-f32", tmp_path / "other", verify=True)


def test_the_9b_is_known_by_its_files(tmp_path):
    (repo,) = checksums.PUBLISHED
    for name in checksums.PUBLISHED[repo]:
        (tmp_path / name).touch()
    assert checksums.published(Source(tmp_path, "copy", None)) is checksums.PUBLISHED[repo]
    assert all(len(digest) == 64 for digest in checksums.PUBLISHED[repo].values())
