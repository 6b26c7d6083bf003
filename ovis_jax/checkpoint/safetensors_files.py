"""The safetensors format: headers read with suspicion, tensors mapped or streamed.

A file is 8 bytes of header length (little endian), a JSON header naming each tensor's dtype, shape
and place, then the tensors' bytes, without gaps.
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

from ovis_jax.checkpoint.problems import Problem, naming_file, printable
from ovis_jax.errors import CheckpointError

DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes that parameters may have, by the format's names."""

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2,
    "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
"""Bytes of a number, by every name that the format has."""
_MAX_HEADER = 100_000_000  # the official library reads none that is longer
_MAX_ELEMENTS = 1 << 60  # an array of more has no size in bytes, even where a length of it is 0
CHUNK = 1 << 22


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor's bytes stand: `start` and `stop` count from the beginning of the file."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a header says: sound or not, every key it names stands in `tensors` or `unusable`.

    `readable` is False when the header itself cannot be parsed, so that its keys are unknown.
    """

    tensors: tuple[TensorEntry, ...] = ()
    unusable: frozenset[str] = frozenset()
    problems: tuple[Problem, ...] = ()
    readable: bool = True


def read_header(path: Path) -> Header:
    """Read and check the header of one file; whatever is wrong becomes a row of `problems`.

    Raises:
      OSError: the file cannot be opened or read.
    """
    with naming_file(path), path.open("rb") as file:
        return parse_header(path, file)


def parse_header(path: Path, file: BinaryIO) -> Header:
    """The same of an open file, of which only the header is read; it will stand at `path`.

    Raises:
      OSError: the file cannot be read.
    """
    size = file.seek(0, 2)
    file.seek(0)
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8:
        return _unreadable(path, "truncated file", "at least 8 bytes", f"{size} bytes")
    if length > _MAX_HEADER:
        limit = f"a header of at most {_MAX_HEADER} bytes"
        return _unreadable(path, "header length", limit, f"{length} bytes")
    if 8 + length > size:
        least = f"at least {8 + length} bytes for the header"
        return _unreadable(path, "truncated file", least, f"{size} bytes")
    raw = file.read(length)
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        repeated.extend(name for name, count in counts.items() if count > 1)
        return dict(pairs)

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is no number")

    try:
        text = raw.decode("utf-8")
        header = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        return _unreadable(path, "header", "JSON", f"{type(error).__name__}: {error}")
    if not isinstance(header, dict):
        return _unreadable(path, "header", "a JSON object", f"a JSON {type(header).__name__}")
    problems = [
        Problem(path.name, name, "duplicate key in header", "one entry", "more than one")
        for name in repeated
    ]
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        what = "an object of strings"
        problems.append(Problem(path.name, "__metadata__", "header", what, _short(metadata)))
    base = 8 + length
    tensors, unusable = [], set()
    for key, value in header.items():
        if fault := _entry_fault(value):
            unusable.add(key)
            problems.append(Problem(path.name, key, *fault))
            continue
        start, stop = value["data_offsets"]
        tensors.append(
            TensorEntry(path, key, value["dtype"], tuple(value["shape"]), base + start, base + stop)
        )
    problems += _layout_problems(path, tensors, base, size, complete=not unusable)
    return Header(tuple(tensors), frozenset(unusable), tuple(problems))


def _unreadable(path: Path, problem: str, expected: str, found: str) -> Header:
    return Header(problems=(Problem(path.name, "", problem, expected, found),), readable=False)


def _entry_fault(value: Any) -> tuple[str, str, str] | None:
    """Problem, expected and found of a tensor's entry, or None when it is sound by itself."""
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        return "header entry", "an object with dtype, shape and data_offsets", _short(value)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        return "header entry", "a dtype such as " + ", ".join(DTYPES), _short(dtype)
    if not _is_counts(shape):
        return "header entry", "a shape of whole numbers", _short(shape)
    if math.prod(length for length in shape if length) >= _MAX_ELEMENTS:
        return "header entry", f"a shape of fewer than {_MAX_ELEMENTS} elements", _short(shape)
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "data offsets", "[start, stop] with start <= stop", _short(offsets)
    # A dtype that is not known here is refused later, by its name.
    size = offsets[1] - offsets[0]
    if dtype in ITEM_BYTES and size != (need := math.prod(shape) * ITEM_BYTES[dtype]):
        found = f"{offsets} holding {size} bytes"
        return "data offsets", f"{need} bytes for {dtype} {shape}", found
    return None


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _layout_problems(
    path: Path, tensors: Iterable[TensorEntry], data_start: int, size: int, *, complete: bool
) -> Iterator[Problem]:
    """Overlaps, and a file that is too short; gaps and excess too where no entry was left out."""
    end = data_start
    for entry in sorted(tensors, key=lambda entry: (entry.start, entry.stop)):
        if entry.start < end or (complete and entry.start > end):
            problem = "overlapping data" if entry.start < end else "gap before data"
            expected, found = end - data_start, entry.start - data_start
            yield Problem(path.name, entry.key, problem, f"start {expected}", f"start {found}")
        end = max(end, entry.stop)
    if size < end:
        yield Problem(path.name, "", "truncated file", f"{end} bytes", f"{size} bytes")
    elif complete and size > end:
        yield Problem(path.name, "", "bytes after the data", f"{end} bytes", f"{size} bytes")


def map_file(path: Path) -> mmap.mmap:
    """Map a whole file for `view_tensor`; it stays open as long as arrays look at it.

    The file must keep its length meanwhile; replacing it by renaming another over it is safe.
    """
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def view_tensor(mapped: mmap.mmap, entry: TensorEntry) -> np.ndarray:
    """A read-only array [*shape] over the mapped file: only the parts that are used are read.

    Raises:
      CheckpointError: the file has become shorter than its header said.
    """
    if len(mapped) < entry.stop:
        raise _shrunk(entry)
    data = np.frombuffer(mapped, np.uint8, entry.stop - entry.start, entry.start)
    dtype = DTYPES[entry.dtype]
    if entry.start % dtype.itemsize:
        data = data.copy()
    return data.view(dtype).reshape(entry.shape)


def read_chunks(entry: TensorEntry, size: int = CHUNK) -> Iterator[memoryview]:
    """The bytes of a tensor in pieces of `size`; each is overwritten by the third after it.

    Raises:
      CheckpointError: the file has become shorter than its header said.
      OSError: the file cannot be opened or read.
    """
    left = entry.stop - entry.start
    buffers = [memoryview(bytearray(min(size, left))) for _ in range(3)]
    with naming_file(entry.path), entry.path.open("rb") as file:
        file.seek(entry.start)
        while left:
            buffers.append(buffers.pop(0))
            piece = buffers[0][: min(size, left)]
            if file.readinto(piece) < len(piece):
                raise _shrunk(entry)
            yield piece
            left -= len(piece)


def _shrunk(entry: TensorEntry) -> CheckpointError:
    return CheckpointError(
        f"{entry.path.name}: {printable(entry.key)}: the file ends before byte {entry.stop}, so it"
        " has changed since its header was read; see that nothing writes to it and start again"
    )
