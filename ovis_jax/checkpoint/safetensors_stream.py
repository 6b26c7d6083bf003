"""Writing safetensors files: as a stream, hashed on the way, going on where a journal says."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ovis_jax.checkpoint.journal import MARK_BYTES, Journal, Written
from ovis_jax.checkpoint.problems import naming_file
from ovis_jax.checkpoint.safetensors_files import ITEM_BYTES

_ALIGNMENT = 64  # where a CPU device can use mapped memory as it is


def _ahead(threads: Executor, pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    """The same pieces, each but the first fetched while the one before it is used.

    For the first a whole file may have to come from the Hub: to wait for that can be interrupted.
    """
    following = iter(pieces)
    piece = next(following, None)
    while piece is not None:
        coming = threads.submit(next, following, None)
        yield piece
        piece = coming.result()


def write_file(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    chunks: Callable[[str], Iterable[memoryview]],
    metadata: Mapping[str, str] | None = None,
    journal: Journal | None = None,
) -> str:
    """Write a file as a stream, header first, and return its digest in hexadecimal.

    `tensors` gives each key's dtype (one of `DTYPES`) and shape, `chunks` its bytes in pieces. The
    data begins at a multiple of 64 bytes and tensors of whole multiples of 64 bytes come first, so
    that those, which are nearly all, can be used where they are mapped. (The format has no gaps.)
    `metadata` goes into the header beside the tensors. With a `journal` what it says of the file is
    kept, as far as it is true, and the rest is written; the digest is then the journal's, otherwise
    sha256.

    While a piece is written, one thread fetches the next and one hashes the last: each must stay as
    it is until the second after it is there.

    Raises:
      OSError: the file exists, without a journal, or cannot be written.
    """

    def num_bytes(key: str) -> int:
        dtype, shape = tensors[key]
        return math.prod(shape) * ITEM_BYTES[dtype]

    def order(key: str) -> tuple[bool, int]:
        return num_bytes(key) % _ALIGNMENT != 0, -ITEM_BYTES[tensors[key][0]]

    keys = sorted(tensors, key=order)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    stop = 0
    for key in keys:
        start, stop = stop, stop + num_bytes(key)
        dtype, shape = tensors[key]
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    written = Written(0, hashlib.sha256()) if journal is None else journal.standing(path.name)
    mode = "xb" if journal is None else "r+b" if written.size else "wb"
    with naming_file(path), path.open(mode) as file, ThreadPoolExecutor(2) as threads:
        file.truncate(written.size)
        file.seek(written.size)
        hashed = threads.submit(lambda: None)

        def write(piece: bytes | memoryview) -> None:
            nonlocal hashed
            hashed.result()
            hashed = threads.submit(written.digest.update, piece)
            file.write(piece)
            written.size += len(piece)

        if not written.size:
            write(len(text).to_bytes(8, "little"))
            write(text)
        marked, end = written.size, 8 + len(text)
        for key in keys:
            start, end = end, end + num_bytes(key)
            if written.size >= end:
                continue  # kept
            for piece in _ahead(threads, chunks(key)):
                write(piece)
            if written.size != end:
                found = written.size - start
                raise ValueError(f"{key}: {found} bytes written, {num_bytes(key)} promised")
            if journal is not None and (written.size - marked >= MARK_BYTES or key == keys[-1]):
                file.flush()
                hashed.result()
                journal.mark(path.name, written)
                marked = written.size
    return written.digest.hexdigest()
