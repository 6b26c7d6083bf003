"""SHA-256 checksums of shards: published on the Hub, recorded in conversion.json, or computed."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from ovis_jax.checkpoint.checkpoint_problems import CheckpointProblem, CheckpointValidationError
from ovis_jax.checkpoint.conversion_record import CONVERSION_FILE
from ovis_jax.checkpoint.file_io import add_file_name_to_os_errors
from ovis_jax.checkpoint.resolve import ResolvedCheckpoint
from ovis_jax.errors import OvisError
from ovis_jax.json_fields import read_json

PUBLISHED_SHA256: Mapping[str, Mapping[str, str]] = {
    "AIDC-AI/Ovis1.6-Gemma2-9B": {
        f"model-{number:05}-of-00005.safetensors": digest
        for number, digest in enumerate(
            [
                "4be2fe245c4c3c52ce9cf1447c39a283d49c4cb902ddf7709fcec4dfae0275ce",
                "ad3948fdc3904281c0d102b981594339724944a8058881354f24e94544483faa",
                "79352679bd5af40bf245c43750378403df96a1fa50106d0eb398da163f997dc3",
                "389198229ab08c096a303436eee2ecaab074b4fe14c7ff527822124bc128c4d9",
                "4589319220d8f6ebdc34abdc5492446aeef6c8f21c5f83ea798f4470138dab12",
            ],
            start=1,
        )
    }
}
"""SHA-256 checksums by repo id and file name, which the Hub shows for the first revision."""


def get_published_sha256(checkpoint: ResolvedCheckpoint) -> Mapping[str, str]:
    """Return the SHA-256 checksums that the Hub publishes for a checkpoint's shards, by file name.

    A local folder is treated as a copy of a known repository if its shards have the same names.

    Raises:
      OvisError: No checksums are published for the checkpoint, or the repository cannot be read.
      OSError: The Hub cannot be reached.
    """
    if checkpoint.revision is not None and checkpoint.name not in PUBLISHED_SHA256:
        from ovis_jax.checkpoint.hub import fetch_shard_sha256

        if sha256 := fetch_shard_sha256(checkpoint.name, checkpoint.revision):
            return sha256
    names = {path.name for path in checkpoint.folder.glob("*.safetensors")}
    for repo_id, known in PUBLISHED_SHA256.items():
        if checkpoint.name == repo_id or names == known.keys():
            return known
    advice = "" if checkpoint.bundled else ", or give the repo id of the checkpoint"
    raise OvisError(
        f"no published checksums of {checkpoint.label} are known; leave out --verify{advice}"
    )


def read_recorded_sha256(checkpoint: ResolvedCheckpoint) -> Mapping[str, str]:
    """Return the SHA-256 checksums of a converted folder's shards, as recorded in conversion.json.

    Raises:
      OvisError: The folder is not a converted folder, or it was converted without checksums.
      ConfigError: The file conversion.json cannot be read.
    """
    path = checkpoint.folder / CONVERSION_FILE
    sha256 = read_json(path).get("sha256") if path.exists() else None
    if not sha256:
        raise OvisError(
            f"{checkpoint.label} has no recorded checksums: ovis-jax convert writes them to"
            f" {CONVERSION_FILE} of the converted folder, unless --no-checksums is given"
        )
    return sha256


def compute_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, as a hexadecimal string.

    Raises:
      OSError: The file cannot be read.
    """
    with add_file_name_to_os_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_sha256(folder: Path, expected: Mapping[str, str | None]) -> None:
    """Check the files in a folder against their SHA-256 checksums.

    Raises:
      CheckpointValidationError: A file is missing or has a different checksum; the error has a row
        for every such file.
      OSError: A file cannot be read.
    """
    problems = []
    for name, sha256 in sorted(expected.items()):
        path = folder / name
        found = compute_sha256(path) if path.is_file() else "no such file"
        if found != sha256:
            problems.append(CheckpointProblem(name, "", "wrong sha256", str(sha256), found))
    if problems:
        raise CheckpointValidationError(
            str(folder), problems, "download or write these files again"
        )
