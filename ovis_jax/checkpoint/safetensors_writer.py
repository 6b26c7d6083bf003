"""Writing safetensors files: small files with the `safetensors` package, checkpoints as a stream.

The package needs all tensors of a file in memory. `write_safetensors` needs only a few chunks in
memory, computes the SHA-256 while writing, and aligns tensors to 64 bytes, so that a CPU device can
use them from a mapped file without a copy.
"""

import hashlib
import json
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ovis_jax.checkpoint.checkpoint_problems import escape_unprintable
from ovis_jax.checkpoint.file_io import add_file_name_to_os_errors, write_json
from ovis_jax.checkpoint.output_dirs import ResumableDir
from ovis_jax.checkpoint.safetensors_reader import CHUNK_BYTES, DTYPES, ITEM_BYTES
from ovis_jax.checkpoint.tensor_index import INDEX_FILE
from ovis_jax.errors import CheckpointError

MAX_SHARD_BYTES = 5_000_000_000
"""Default maximum size of the tensors in one shard, in bytes."""

TensorSpecs = Mapping[str, tuple[str, tuple[int, ...]]]
"""Safetensors dtype, such as "BF16", and shape of each tensor, by name."""

ChunkReader = Callable[[str], Iterable[memoryview]]
"""A function that takes a tensor name and yields the tensor's bytes in chunks."""

_ALIGNMENT = 64  # with this alignment, a CPU device uses mapped memory without a copy


def count_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Return the size in bytes of a tensor in a file."""
    return math.prod(shape) * ITEM_BYTES[dtype]


def total_bytes(tensors: TensorSpecs) -> int:
    """Return the total size in bytes of all tensors in files."""
    return sum(count_bytes(*spec) for spec in tensors.values())


def plan_shards(
    tensors: TensorSpecs,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    source_files: Mapping[str, Path] | None = None,
) -> dict[str, list[str]]:
    """Assign tensors to shards, in order.

    Args:
      tensors: Dtypes and shapes by name.
      max_shard_bytes: Maximum size of the tensors in one shard; a larger tensor gets its own shard.
      source_files: Source file of each tensor, by tensor name. If given, all tensors of a shard
        come from the same source file.

    Returns:
      The tensor names in each shard, by file name.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in tensors.items():
        size = count_bytes(*spec)
        group = groups[-1]
        next_file = source_files and group and source_files[group[-1]] != source_files[name]
        if group and (next_file or filled + size > max_shard_bytes):
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return {
        f"model-{number:05}-of-{len(groups):05}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def select_unfinished(
    tensors: TensorSpecs, shards: Mapping[str, list[str]], finished: Container[str]
) -> TensorSpecs:
    """Return the tensors in the shards whose file names are not in `finished`."""
    names = [name for shard, group in shards.items() if shard not in finished for name in group]
    return {name: tensors[name] for name in names}


def write_shards(
    folder: Path,
    tensors: TensorSpecs,
    read_tensor: ChunkReader,
    shards: Mapping[str, list[str]],
    *,
    metadata: Mapping[str, str] | None = None,
    checksums: bool = True,
    resumable: ResumableDir | None = None,
) -> dict[str, str | None]:
    """Write the shards of a checkpoint and their index file.

    Args:
      folder: Existing folder to write into.
      tensors: Dtypes and shapes by name.
      read_tensor: Called once per tensor, in file order, except for shards that are already
        finished in `resumable`.
      shards: Tensor names by file name, as returned by `plan_shards`.
      metadata: Strings for the header of every shard.
      checksums: Whether to compute the SHA-256 of each file.
      resumable: Record of the finished shards, which are kept. Each new shard is added to the
        record.

    Returns:
      SHA-256 by file name; all values are None without checksums.

    Raises:
      OSError: A file cannot be written.
    """
    sha256: dict[str, str | None] = {}
    for shard, names in shards.items():
        if resumable is not None and shard in resumable.finished:
            sha256[shard] = resumable.finished[shard]
            continue
        specs = {name: tensors[name] for name in names}
        sha256[shard] = write_safetensors(
            folder / shard, specs, read_tensor, metadata, compute_checksum=checksums
        )
        if resumable is not None:
            resumable.record_finished(shard, sha256[shard])
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": weight_map}
    write_json(folder / INDEX_FILE, index)
    return sha256


def write_safetensors(
    path: Path,
    tensors: TensorSpecs,
    read_tensor: ChunkReader,
    metadata: Mapping[str, str] | None = None,
    *,
    compute_checksum: bool = True,
) -> str | None:
    """Write a safetensors file as a stream, under a temporary name until it is complete.

    The format allows no padding between tensors. To align nearly all of them, the data starts at a
    multiple of 64 bytes, and tensors whose size is a multiple of 64 bytes come first.

    While a chunk is written, one thread reads the next chunk and another thread hashes the previous
    one. `read_tensor` must therefore not modify a chunk until it has yielded the next two chunks.

    Args:
      path: File to write.
      tensors: Dtypes and shapes by name; all safetensors dtypes are supported.
      read_tensor: Called once per tensor, in file order.
      metadata: Strings for the header.
      compute_checksum: Whether to compute the SHA-256 of the file.

    Returns:
      The SHA-256 of the file as a hexadecimal string, or None if `compute_checksum` is False.

    Raises:
      OSError: The file cannot be written.
      ValueError: The chunks of a tensor do not add up to its size.
    """
    names = order_in_file(tensors)
    digest = hashlib.sha256()
    temporary = path.with_name(f"{path.name}.tmp")
    with (
        add_file_name_to_os_errors(temporary),
        temporary.open("wb") as file,
        ThreadPoolExecutor(2) as threads,
    ):
        hashed = threads.submit(lambda: None)

        def write(chunk: bytes | memoryview) -> None:
            nonlocal hashed
            hashed.result()
            if compute_checksum:
                hashed = threads.submit(digest.update, chunk)
            file.write(chunk)

        write(_encode_header({name: tensors[name] for name in names}, metadata))
        for name in names:
            size = 0
            for chunk in _read_ahead(threads, read_tensor(name)):
                write(chunk)
                size += len(chunk)
            if size != (expected := count_bytes(*tensors[name])):
                raise ValueError(f"{name}: the chunks have {size} bytes, expected {expected}")
        hashed.result()
    temporary.replace(path)
    return digest.hexdigest() if compute_checksum else None


def order_in_file(tensors: TensorSpecs) -> list[str]:
    """Return the names of tensors in the order in which `write_safetensors` writes them."""

    def sort_key(name: str) -> tuple[bool, int]:
        return count_bytes(*tensors[name]) % _ALIGNMENT != 0, -ITEM_BYTES[tensors[name][0]]

    return sorted(tensors, key=sort_key)


def _encode_header(tensors: TensorSpecs, metadata: Mapping[str, str] | None) -> bytes:
    """Encode a header's length and JSON, padded so that the total is a multiple of 64 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    stop = 0
    for name, (dtype, shape) in tensors.items():
        start, stop = stop, stop + count_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _read_ahead(threads: Executor, chunks: Iterable[memoryview]) -> Iterator[memoryview]:
    """Yield chunks; while the caller uses a chunk, a thread reads the next one.

    The first chunk is read in the calling thread: reading it may wait for a download, and only a
    wait in the main thread can be interrupted.
    """
    iterator = iter(chunks)
    chunk = next(iterator, None)
    while chunk is not None:
        following = threads.submit(next, iterator, None)
        yield chunk
        chunk = following.result()


def save_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays to a safetensors file, with the `safetensors` package.

    Raises:
      OSError: The file cannot be written.
    """
    try:
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(contiguous, path, dict(metadata) if metadata else None)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def cast_array(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """Cast an array; if the array already has the dtype, it is returned unchanged.

    Args:
      name: Name of the tensor in the error message.
      array: Array of any shape.
      dtype: "F32", "F16" or "BF16".

    Raises:
      CheckpointError: A finite number is too large for the dtype.
    """
    if array.dtype == DTYPES[dtype]:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(DTYPES[dtype])
    if np.any(np.isinf(result) & ~np.isinf(array)):
        raise CheckpointError(
            f"{escape_unprintable(name)}: contains numbers too large for {DTYPES[dtype].name};"
            " choose bfloat16 or float32"
        )
    return result


def split_array(array: np.ndarray) -> Iterator[memoryview]:
    """Yield the bytes of an array in chunks, in the form that `write_safetensors` expects."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return (data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES))
