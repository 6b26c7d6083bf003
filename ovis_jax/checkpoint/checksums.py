"""sha256 of files: what the Hub publishes, and whether a folder still holds it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from ovis_jax.checkpoint.hub import digests
from ovis_jax.checkpoint.problems import CheckpointProblems, Problem, naming_file
from ovis_jax.checkpoint.source import Source
from ovis_jax.checkpoint.writer import CONVERSION_FILE
from ovis_jax.errors import OvisError
from ovis_jax.fields import read_json

PUBLISHED: Mapping[str, Mapping[str, str]] = {
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
"""Repo id -> file -> sha256, as the Hub shows it of the first published revision."""


def published(source: Source) -> Mapping[str, str]:
    """What a checkpoint's shards hash to where they were published.

    A folder is taken for the known repo whose files have the same names.

    Raises:
      OvisError: no checksums are known of it, or the repo may not be read.
      OSError: the Hub cannot be reached.
    """
    if source.revision is not None and source.name not in PUBLISHED:
        shards = digests(source.name, source.revision)
        if shards:
            return shards
    names = {path.name for path in source.folder.glob("*.safetensors")}
    for repo, known in PUBLISHED.items():
        if source.name == repo or names == known.keys():
            return known
    raise OvisError(
        f"no published checksums are known of {source.name}; leave out --verify, or give the id of"
        " the repo that it is of"
    )


def recorded(folder: Path) -> Mapping[str, str]:
    """What conversion.json says that the shards of a converted folder hash to.

    Raises:
      OvisError: it is no converted folder, or was made without checksums.
      ConfigError: conversion.json cannot be read.
    """
    path = folder / CONVERSION_FILE
    digests = read_json(path).get("sha256") if path.exists() else None
    if not digests:
        raise OvisError(
            f"{folder} has no checksums: convert.from_hf writes them into {CONVERSION_FILE}, unless"
            " --no-checksums was given"
        )
    return digests


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal.

    Raises:
      OSError: it cannot be read.
    """
    with naming_file(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(folder: Path, expected: Mapping[str, str]) -> None:
    """Hold the files of a folder to their checksums.

    Raises:
      CheckpointProblems: with a row for every file that is not there or is another.
      OSError: a file cannot be read.
    """
    problems = []
    for name, digest in sorted(expected.items()):
        path = folder / name
        found = sha256(path) if path.is_file() else "no such file"
        if found != digest:
            problems.append(Problem(name, "", "wrong sha256", digest, found))
    if problems:
        raise CheckpointProblems(str(folder), problems, "get these files again")
