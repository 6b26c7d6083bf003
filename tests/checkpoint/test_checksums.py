"""SHA-256 of shards, as published and as recorded."""

import subprocess
import sys
from pathlib import Path

import pytest
from golden_copies import GOLDEN, copy_golden, flip_last_bit, shard_with

from ovis_jax.checkpoint import checksums
from ovis_jax.checkpoint.checkpoint_problems import CheckpointValidationError
from ovis_jax.checkpoint.checksums import compute_sha256, get_published_sha256
from ovis_jax.checkpoint.resolve import ResolvedCheckpoint
from ovis_jax.conversion.from_hf import convert_from_hf
from ovis_jax.errors import OvisError

ROOT = Path(__file__).parents[2]
SOURCE = GOLDEN / "tiny-bf16-sharded"


@pytest.mark.slow
def test_inspect_checks_a_converted_folder(tmp_path):
    record = convert_from_hf(SOURCE, tmp_path / "out")
    command = [sys.executable, "-m", "ovis_jax", "inspect", "--check", str(tmp_path / "out")]
    valid = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (
        valid.returncode == 0
        and "3 files checked: equal to the checksums in conversion.json" in valid.stdout
    ), valid
    shard = min(record["sha256"])
    flip_last_bit(tmp_path / "out" / shard)
    invalid = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert invalid.returncode == 1 and "wrong sha256" in invalid.stderr and shard in invalid.stderr


def test_folder_without_recorded_checksums(tmp_path):
    convert_from_hf(SOURCE, tmp_path / "out", checksums=False)
    for checkpoint in (
        ResolvedCheckpoint(tmp_path / "out", "out", None, "out"),
        ResolvedCheckpoint(SOURCE, "tiny", None, "tiny"),
    ):
        with pytest.raises(OvisError, match=f"^{checkpoint.label} has no recorded checksums"):
            checksums.read_recorded_sha256(checkpoint)


def test_source_is_compared_with_published_checksums(tmp_path, monkeypatch):
    published = {path.name: compute_sha256(path) for path in SOURCE.glob("*.safetensors")}
    monkeypatch.setattr(checksums, "PUBLISHED_SHA256", {"AIDC-AI/tiny": published})
    convert_from_hf(SOURCE, tmp_path / "out", verify=True)
    source = copy_golden("tiny-bf16-sharded", tmp_path / "source")
    shard = shard_with(source, "vte.weight")
    flip_last_bit(shard)
    with pytest.raises(CheckpointValidationError) as error:
        convert_from_hf(source, tmp_path / "other", verify=True)
    (problem,) = error.value.problems
    assert problem.file == shard.name and problem.expected == published[shard.name]
    assert not (tmp_path / "other.partial").exists()
    with pytest.raises(OvisError, match=r"no published checksums of .*tiny-f32 are known"):
        convert_from_hf(GOLDEN / "tiny-f32", tmp_path / "other", verify=True)


def test_published_checksums_of_the_9b(tmp_path):
    ((repo_id, published),) = checksums.PUBLISHED_SHA256.items()
    for name in published:
        (tmp_path / name).touch()
    assert get_published_sha256(ResolvedCheckpoint(tmp_path, "copy", None, "copy")) is published
    assert get_published_sha256(ResolvedCheckpoint(tmp_path, repo_id, "c", repo_id)) is published
    assert all(len(sha256) == 64 for sha256 in published.values())
