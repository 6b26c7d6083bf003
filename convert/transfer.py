"""What a conversion moves in either direction: tensors in pieces, small files as they are."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from ovis_jax.checkpoint.journal import Journal
from ovis_jax.checkpoint.problems import printable
from ovis_jax.checkpoint.safetensors_files import DTYPES, TensorEntry, read_chunks
from ovis_jax.checkpoint.writer import (
    Tensors,
    array_pieces,
    cast,
    versions,
    with_dtype,
    write_json,
)
from ovis_jax.errors import CheckpointError
from ovis_jax.fields import read_json
from ovis_jax.model.layers import LowRank

OnProgress = Callable[[str, int, int], None]
"""Called with the tensor being written, the bytes written so far and their sum at the end."""

Chunks = Callable[[str], Iterable[memoryview]]
"""The bytes of a tensor in pieces, by its name in the files being written."""


def pieces(entry: TensorEntry, dtype: str) -> Iterator[memoryview]:
    """The bytes of a tensor, cast to `dtype` ("F32", "F16" or "BF16"); see `read_chunks`.

    Raises:
      CheckpointError: a number is too large for the dtype, or the file has become shorter.
      OSError: the file cannot be read.
    """
    for piece in read_chunks(entry):
        if entry.dtype != dtype:
            source = np.frombuffer(piece, DTYPES[entry.dtype])
            piece = cast(entry.key, source, dtype).view(np.uint8).data
        yield piece


def merged_pieces(
    entry: TensorEntry, a: Array, b: Array, scale: float, dtype: str
) -> Iterator[memoryview]:
    """The bytes of a matrix with an adapter, w + scale * b a in float32, then cast to `dtype`.

    Raises:
      CheckpointError, OSError: as `pieces`.
    """
    stored = np.frombuffer(b"".join(map(bytes, read_chunks(entry))), DTYPES[entry.dtype])
    w = jnp.asarray(stored.reshape(entry.shape).astype(np.float32))
    return array_pieces(cast(entry.key, np.asarray(LowRank(w, a * scale, b).merged()), dtype))


def result_facts(
    entries: Mapping[str, TensorEntry],
    tensors: Tensors,
    *settings: Any,
    origin: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a result depends on: the files read, where in them each tensor stands, and settings.

    The settings are JSON. `origin` says which files were read where they need not be there; without
    it their sizes and times of change do.

    Raises:
      OSError: a file is not there.
    """
    layout = [(name, str(x.path), x.dtype, x.start, x.stop) for name, x in entries.items()]
    written = hashlib.sha256(json.dumps([layout, [*tensors.items()], settings]).encode())
    if origin is None:
        origin = {"sources": file_facts(entry.path for entry in entries.values())}
    return {
        **origin,
        "tensors and options": written.hexdigest(),
        "versions": versions(),
    }


def file_facts(paths: Iterable[Path]) -> dict[str, Any]:
    """Size and time of change, in nanoseconds, of files.

    Raises:
      OSError: one is not there.
    """
    stats = {str(path): path.stat() for path in set(paths)}
    return {path: [found.st_size, found.st_mtime_ns] for path, found in sorted(stats.items())}


def check_unchanged(before: Mapping[str, Any]) -> None:
    """Refuse a result of files that are not what `file_facts` said before they were read.

    Raises:
      CheckpointError: one is not what it was.
      OSError: one is not there any more.
    """
    for name, found in file_facts(map(Path, before)).items():
        if found != before[name]:
            raise CheckpointError(
                f"{printable(name)} has changed while it was read; see that nothing writes to it"
                " and start again"
            )


def counted(
    chunks: Chunks, total: int, progress: OnProgress | None, journal: Journal | None = None
) -> Chunks:
    """The same pieces, of which `progress` is told one by one; `total` is the bytes of them all.

    What the `journal` keeps counts as done.
    """
    done = 0

    def count(name: str) -> Iterator[memoryview]:
        nonlocal done
        for piece in chunks(name):
            yield piece
            done += len(piece)
            if progress is not None:
                kept = 0 if journal is None else journal.kept  # headers too
                progress(name, min(done + kept, total), total)

    return count


def copy_small_files(folder: Path, partial: Path, names: Iterable[str], recast: str | None) -> None:
    """Copy the two configs and the files of these names from `folder`, byte for byte.

    With `recast` ("F32", "F16" or "BF16") config.json is rewritten to state that dtype.

    Raises:
      OSError: a file cannot be read or written.
    """
    for name in ("config.json", "generation_config.json", *names):
        shutil.copyfile(folder / name, partial / name)
    if recast is not None:
        write_json(partial / "config.json", with_dtype(read_json(folder / "config.json"), recast))
