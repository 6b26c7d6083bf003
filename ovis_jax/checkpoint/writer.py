"""Writes a converted folder: shards, index and small files, complete or not there at all."""

import errno
import json
import math
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ovis_jax.checkpoint.folder import INDEX_FILE
from ovis_jax.checkpoint.journal import Journal
from ovis_jax.checkpoint.problems import naming_file, printable
from ovis_jax.checkpoint.safetensors_files import CHUNK, DTYPES
from ovis_jax.checkpoint.safetensors_stream import write_file
from ovis_jax.errors import CheckpointError, OvisError

CONVERSION_FILE = "conversion.json"
FORMAT = 1
MAX_SHARD_BYTES = 5_000_000_000

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Parameter path -> dtype ("F32", "F16" or "BF16") and shape."""


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """The bytes that a tensor takes in a file."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def plan_shards(
    tensors: Tensors,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    origins: Mapping[str, Path] | None = None,
) -> dict[str, list[str]]:
    """File name -> paths: filled in order, none above the limit unless one tensor alone is.

    With `origins`, the file that each path comes from, none holds tensors of two of these.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for path, (dtype, shape) in tensors.items():
        size = tensor_bytes(dtype, shape)
        moved = bool(origins and groups[-1] and origins[groups[-1][-1]] != origins[path])
        if groups[-1] and (moved or filled + size > max_shard_bytes):
            groups.append([])
            filled = 0
        groups[-1].append(path)
        filled += size
    return {
        f"model-{number:05}-of-{len(groups):05}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def check_destination(folder: Path) -> None:
    """Refuse a destination that holds something.

    Raises:
      OvisError: it exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OvisError(
            f"{folder} exists and is not an empty folder; nothing was written: remove it, or give"
            " another destination"
        )


@contextmanager
def whole_or_absent(folder: Path) -> Iterator[Path]:
    """A new folder to write into, beside `folder`, which takes its name when the block ends well.

    On any exception, an interrupt too, the new folder is removed and `folder` stays as it was.

    Raises:
      OvisError: `folder` exists and is not an empty folder.
      OSError: a folder cannot be made or renamed.
    """
    check_destination(folder)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir()
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def nearest_existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists: on the disk where it would be made."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    return place


def check_space(folder: Path, need: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
      OSError: the disk of `folder`, or of the nearest folder above it that exists, has less free.
    """
    place = nearest_existing(folder)
    free = shutil.disk_usage(place).free
    if free < need:
        what = f"{need / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; make room in"
        raise OSError(errno.ENOSPC, what, str(place))


def write_tensors(
    folder: Path,
    tensors: Tensors,
    chunks: Callable[[str], Iterable[memoryview]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    journal: Journal | None = None,
    origins: Mapping[str, Path] | None = None,
) -> dict[str, str]:
    """Write every shard and the index as a stream; returns file name -> digest, see `write_file`.

    `chunks` gives the bytes of a path in pieces; it is called once a path, shard by shard, or not
    at all for what the `journal` says is there. `metadata` goes into the header of every shard;
    `origins` are as in `plan_shards`.

    Raises:
      OSError: a file cannot be written.
    """
    shards = plan_shards(tensors, max_shard_bytes, origins)
    digests = {
        name: write_file(
            folder / name, {path: tensors[path] for path in paths}, chunks, metadata, journal
        )
        for name, paths in shards.items()
    }
    total = sum(tensor_bytes(*tensor) for tensor in tensors.values())
    weight_map = {path: name for name, paths in shards.items() for path in paths}
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return digests


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as JSON, as the Hub lays it out.

    Raises:
      OSError: the file cannot be written.
    """
    with naming_file(path):
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def cast(path: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """An array in another dtype, the same array when it has that one.

    Raises:
      CheckpointError: a number is too large for the new dtype.
    """
    if array.dtype == DTYPES[dtype]:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(DTYPES[dtype])
    if np.any(np.isinf(result) & ~np.isinf(array)):
        raise CheckpointError(
            f"{printable(path)}: holds numbers too large for {DTYPES[dtype].name}; choose bfloat16"
            " or float32"
        )
    return result


def array_pieces(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array in pieces, as `write_tensors` and `write_file` take them."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return (data[start : start + CHUNK] for start in range(0, len(data), CHUNK))


def with_dtype(config_json: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A parsed config.json that states another dtype, at the top and for the decoder."""
    stated = {"torch_dtype": DTYPES[dtype].name}
    return {**config_json, **stated, "llm_config": {**config_json["llm_config"], **stated}}


def conversion_record(
    tensors: Tensors, digests: Mapping[str, str], **source: Any
) -> dict[str, Any]:
    """The content of conversion.json: what was written by what; `source` tells of what it was."""
    return {
        "format": FORMAT,
        **source,
        "versions": versions(),
        "dtype": DTYPES[next(iter(tensors.values()))[0]].name,
        "tensors": len(tensors),
        "parameters": sum(math.prod(shape) for _, shape in tensors.values()),
        "sha256": dict(digests),
    }


def versions() -> dict[str, str]:
    """Of what writes: this library and those that it writes with."""
    return {name: _version(name) for name in ("ovis-jax", "jax", "numpy", "ml-dtypes")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
