"""Writing safetensors files: small ones with the `safetensors` package, checkpoints as a stream.

The package needs all tensors of a file in memory. `write_safetensors` needs a few chunks, computes
SHA-256 on the way and aligns tensors to 64 bytes, so that a CPU device can use them as mapped.
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
"""Default limit for the tensors of one shard."""

TensorSpecs = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> dtype ("F32", "F16" or "BF16") and shape."""

ChunkReader = Callable[[str], Iterable[memoryview]]
"""Function from a tensor name to the tensor's bytes in chunks."""

_ALIGNMENT = 64  # alignment at which a CPU device uses mapped memory without a copy


def count_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Return the size of a tensor in a file, in bytes."""
    return math.prod(shape) * ITEM_BYTES[dtype]


def total_bytes(tensors: TensorSpecs) -> int:
    """Return the size of all tensors in files, in bytes."""
    return sum(count_bytes(*spec) for spec in tensors.values())


def plan_shards(
    tensors: TensorSpecs,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    source_files: Mapping[str, Path] | None = None,
) -> dict[str, list[str]]:
    """Distribute tensors over shards in order.

    Args:
      tensors: dtypes and shapes by name.
      max_shard_bytes: limit for the tensors of a shard; a larger tensor gets its own shard.
      source_files: source file by tensor name; a shard then has tensors from one source file only.

    Returns:
      File name -> tensor names.
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
    """Return the tensors of the shards whose file names are not in `finished`."""
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
    """Write the shards of a checkpoint and their index.

    Args:
      folder: existing folder to write into.
      tensors: dtypes and shapes by name.
      read_tensor: called once per tensor, in the order of the file; not called for shards that
        `resumable` has.
      shards: tensor names by file name, see `plan_shards`.
      metadata: strings for the header of every shard.
      checksums: whether to compute SHA-256.
      resumable: record of finished shards; these are kept, and each new one is recorded.

    Returns:
      SHA-256 by file name; None without checksums.

    Raises:
      OSError: a file cannot be written.
    """
    sha256: dict[str, str | None] = {}
    for shard, names in shards.items():
        if resumable is not None and shard in resumable.finished:
            sha256[shard] = resumable.finished[shard]
            continue
        specs = {name: tensors[name] for name in names}
        sha256[shard] = write_safetensors(
            folder / shard, specs, read_tensor, metadata, checksum=checksums
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
    checksum: bool = True,
) -> str | None:
    """Write a safetensors file as a stream; it gets its name when it is complete.

    The format has no gaps. The data starts at a multiple of 64 bytes, and tensors whose size is a
    multiple of 64 bytes come first, so that these, which are nearly all, are aligned.

    While a chunk is written, one thread reads the next one and another hashes the previous one. A
    chunk must therefore stay unchanged until the second one after it has been read.

    Args:
      path: the file.
      tensors: dtypes and shapes by name; all dtypes of safetensors are possible.
      read_tensor: called once per tensor, in the order of the file.
      metadata: strings for the header.
      checksum: whether to compute SHA-256.

    Returns:
      SHA-256 of the file in hexadecimal, or None without `checksum`.

    Raises:
      OSError: the file cannot be written.
      ValueError: the chunks of a tensor have another size than the tensor.
    """

    def sort_key(name: str) -> tuple[bool, int]:
        return count_bytes(*tensors[name]) % _ALIGNMENT != 0, -ITEM_BYTES[tensors[name][0]]

    names = sorted(tensors, key=sort_key)
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
            if checksum:
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
    return digest.hexdigest() if checksum else None


def _encode_header(tensors: TensorSpecs, metadata: Mapping[str, str] | None) -> bytes:
    """Encode the length and the JSON of a header, padded to a multiple of 64 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    stop = 0
    for name, (dtype, shape) in tensors.items():
        start, stop = stop, stop + count_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _read_ahead(threads: Executor, chunks: Iterable[memoryview]) -> Iterator[memoryview]:
    """Yield chunks while a thread reads the next one.

    The first chunk is read in this thread: it can wait for a download, and only a wait in the main
    thread can be interrupted.
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
    """Write arrays that are in memory to a safetensors file, with the `safetensors` package.

    Raises:
      OSError: the file cannot be written.
    """
    try:
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(contiguous, path, dict(metadata) if metadata else None)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def cast_array(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """Cast an array; an array that has the dtype is returned unchanged.

    Args:
      name: name of the tensor, for the error.
      array: array of any shape.
      dtype: "F32", "F16" or "BF16".

    Raises:
      CheckpointError: a finite number is too large for the dtype.
    """
    if array.dtype == DTYPES[dtype]:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(DTYPES[dtype])
    if np.any(np.isinf(result) & ~np.isinf(array)):
        raise CheckpointError(
            f"{escape_unprintable(name)}: holds numbers too large for {DTYPES[dtype].name}; choose"
            " bfloat16 or float32"
        )
    return result


def split_array(array: np.ndarray) -> Iterator[memoryview]:
    """Return the bytes of an array in chunks, as `write_safetensors` takes them."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return (data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES))
