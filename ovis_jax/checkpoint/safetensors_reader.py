"""Reading safetensors files: validated headers, memory-mapped tensors, and tensors in chunks.

A file consists of the header length (8 bytes, little endian), a JSON header with each tensor's
dtype, shape and data offsets, and the data of the tensors without gaps.

The `safetensors` package decides whether a local file is valid, but it stops at the first fault and
usually does not name the tensor. The checks here produce one row per fault, with the key and the
expected value, and they also work on headers of files that have not been downloaded. This module
also reads the tensors itself, because the package copies whole tensors. With a mapped file, a
single slice can be read, and a CPU device can use the memory without a copy. Reading in chunks
keeps the memory of a conversion bounded.
"""

import json
import math
import mmap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ovis_jax.checkpoint.checkpoint_problems import CheckpointProblem, escape_unprintable
from ovis_jax.checkpoint.file_io import add_file_name_to_os_errors
from ovis_jax.errors import CheckpointError
from ovis_jax.user_files import GIT_LFS_POINTER, GIT_LFS_START

DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Dtypes that parameters can have, by safetensors name."""

INTEGER_DTYPES: Mapping[str, np.dtype] = {
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
}
"""Dtypes of quantized tensors, by safetensors name."""

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2,
    "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
"""Number of bytes per element, by safetensors dtype name."""

CHUNK_BYTES = 1 << 22
"""Size of the chunks in which tensors are read."""

_MAX_HEADER_BYTES = 100_000_000  # the limit in the safetensors package
_MAX_ELEMENTS = 1 << 60  # numpy rejects larger shapes, even if a dimension is 0


@dataclass(frozen=True)
class TensorInfo:
    """Location, dtype and shape of a tensor; `start` and `stop` are byte offsets in the file."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """Contents of a safetensors header.

    Attributes:
      tensors: Tensors whose header entries are valid.
      unusable_keys: Keys whose header entries are invalid.
      problems: Faults in the header.
      readable: Whether the header could be parsed. If it is False, the keys are unknown.
    """

    tensors: tuple[TensorInfo, ...] = ()
    unusable_keys: frozenset[str] = frozenset()
    problems: tuple[CheckpointProblem, ...] = ()
    readable: bool = True


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of a file; faults are listed in `problems`.

    Raises:
      OSError: The file cannot be opened or read.
    """
    with add_file_name_to_os_errors(path), path.open("rb") as file:
        header = parse_header(path, file)
    if header.problems:
        return header
    try:
        with safe_open(path, "numpy"):
            return header
    except SafetensorError as error:
        fault = "a header that the safetensors package accepts", str(error)
        problem = CheckpointProblem(path.name, "", "header", *fault)
        return SafetensorsHeader(header.tensors, header.unusable_keys, (problem,))


def parse_header(path: Path, file: BinaryIO) -> SafetensorsHeader:
    """Parse and check the header of an open file, which may be remote.

    Args:
      path: Local path of the file, which is stored in the result.
      file: A seekable file; only its header is read.

    Raises:
      OSError: The file cannot be read.
    """

    def unreadable(problem: str, expected: str, found: str) -> SafetensorsHeader:
        row = CheckpointProblem(path.name, "", problem, expected, found)
        return SafetensorsHeader(problems=(row,), readable=False)

    size = file.seek(0, 2)
    file.seek(0)
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if (prefix + file.read(len(GIT_LFS_START) - 8)) == GIT_LFS_START:
        return unreadable("Git LFS pointer", "the weights", GIT_LFS_POINTER)
    file.seek(8)
    if len(prefix) < 8:
        return unreadable("truncated file", "at least 8 bytes", f"{size} bytes")
    if length > _MAX_HEADER_BYTES:
        limit = f"a header of at most {_MAX_HEADER_BYTES} bytes"
        return unreadable("header length", limit, f"{length} bytes")
    if 8 + length > size:
        least = f"at least {8 + length} bytes for the header"
        return unreadable("truncated file", least, f"{size} bytes")
    repeated: list[str] = []

    def find_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        repeated.extend(name for name, count in counts.items() if count > 1)
        return dict(pairs)

    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=find_repeated)
    except (ValueError, RecursionError) as error:
        return unreadable("header", "JSON", f"{type(error).__name__}: {error}")
    if not isinstance(header, dict):
        return unreadable("header", "a JSON object", f"a JSON {type(header).__name__}")
    header.pop("__metadata__", None)
    problems = [
        CheckpointProblem(path.name, name, "duplicate key in header", "one entry", "more than one")
        for name in repeated
    ]
    data_start = 8 + length
    tensors, unusable = [], set()
    for key, value in header.items():
        if fault := _find_entry_fault(value):
            unusable.add(key)
            problems.append(CheckpointProblem(path.name, key, *fault))
            continue
        start, stop = (data_start + offset for offset in value["data_offsets"])
        shape = tuple(value["shape"])
        tensors.append(TensorInfo(path, key, value["dtype"], shape, start, stop))
    problems += _find_layout_faults(path, tensors, data_start, size, complete=not unusable)
    return SafetensorsHeader(tuple(tensors), frozenset(unusable), tuple(problems))


def _find_entry_fault(value: Any) -> tuple[str, str, str] | None:
    """Return (problem, expected, found) for a tensor's header entry, or None if it is valid."""
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        return "header entry", "an object with dtype, shape and data_offsets", _shorten(value)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        return "header entry", "a dtype such as " + ", ".join(DTYPES), _shorten(dtype)
    if not _is_list_of_counts(shape):
        return "header entry", "a shape of whole numbers", _shorten(shape)
    if math.prod(length for length in shape if length) >= _MAX_ELEMENTS:
        return "header entry", f"a shape of fewer than {_MAX_ELEMENTS} elements", _shorten(shape)
    if not _is_list_of_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "data offsets", "[start, stop] with start <= stop", _shorten(offsets)
    size = offsets[1] - offsets[0]
    if dtype in ITEM_BYTES and size != (need := math.prod(shape) * ITEM_BYTES[dtype]):
        found = f"{offsets} holding {size} bytes"
        return "data offsets", f"{need} bytes for {dtype} {shape}", found
    return None


def _is_list_of_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _find_layout_faults(
    path: Path, tensors: Iterable[TensorInfo], data_start: int, size: int, *, complete: bool
) -> Iterator[CheckpointProblem]:
    """Yield overlaps and missing data; if the entries are `complete`, also gaps and excess data."""
    end = data_start
    for info in sorted(tensors, key=lambda info: (info.start, info.stop)):
        if info.start < end or (complete and info.start > end):
            problem = "overlapping data" if info.start < end else "gap before data"
            expected, found = f"start {end - data_start}", f"start {info.start - data_start}"
            yield CheckpointProblem(path.name, info.key, problem, expected, found)
        end = max(end, info.stop)
    if size < end:
        yield CheckpointProblem(path.name, "", "truncated file", f"{end} bytes", f"{size} bytes")
    elif complete and size > end:
        problem = "bytes after the data"
        yield CheckpointProblem(path.name, "", problem, f"{end} bytes", f"{size} bytes")


def map_file(path: Path) -> mmap.mmap:
    """Map a file into memory for `view_tensor`; the mapping exists as long as arrays refer to it.

    The length of the file must not change. Replacing the file by renaming another file is safe.

    Raises:
      OSError: The file cannot be opened or mapped.
    """
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def view_tensor(mapped: mmap.mmap, info: TensorInfo) -> np.ndarray:
    """Return a tensor as a read-only view of a mapped file; only parts that are used are read.

    Raises:
      CheckpointError: The file has become shorter since its header was read.
    """
    if len(mapped) < info.stop:
        raise _shrunk_file_error(info)
    data = np.frombuffer(mapped, np.uint8, info.stop - info.start, info.start)
    dtype = DTYPES.get(info.dtype) or INTEGER_DTYPES[info.dtype]
    if info.start % dtype.itemsize:
        data = data.copy()
    return data.view(dtype).reshape(info.shape)


def read_chunks(info: TensorInfo, size: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in chunks; each chunk is valid until two more have been yielded.

    Args:
      info: The tensor.
      size: Size of a chunk in bytes.

    Raises:
      CheckpointError: The file has become shorter since its header was read.
      OSError: The file cannot be opened or read.
    """
    remaining = info.stop - info.start
    buffers = [memoryview(bytearray(min(size, remaining))) for _ in range(3)]
    with add_file_name_to_os_errors(info.path), info.path.open("rb") as file:
        file.seek(info.start)
        while remaining:
            buffers.append(buffers.pop(0))
            chunk = buffers[0][: min(size, remaining)]
            if file.readinto(chunk) < len(chunk):
                raise _shrunk_file_error(info)
            yield chunk
            remaining -= len(chunk)


def _shrunk_file_error(info: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"{info.path.name}: {escape_unprintable(info.key)}: the file ends before byte {info.stop},"
        " so it has changed since its header was read; make sure that nothing writes to it and"
        " start again"
    )
