"""Reading tensors in chunks for conversion and export: cast, quantized, or with adapters merged."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jax import Array

from ovis_jax.checkpoint.gptq import repack_gptq
from ovis_jax.checkpoint.safetensors_reader import (
    CHUNK_BYTES,
    DTYPES,
    ITEM_BYTES,
    TensorInfo,
    map_file,
    read_chunks,
    view_tensor,
)
from ovis_jax.checkpoint.safetensors_writer import cast_array, split_array
from ovis_jax.model.linear import LowRank
from ovis_jax.quantization import pack_int4, quantize_rows, row_scales


def read_cast_chunks(info: TensorInfo, dtype: str) -> Iterator[memoryview]:
    """Yield the bytes of a tensor cast to a dtype, in chunks as in `read_chunks`.

    Args:
      info: The tensor.
      dtype: "F32", "F16" or "BF16".

    Raises:
      CheckpointError: A number is too large for the dtype, or the file has become shorter since its
        header was read.
      OSError: The file cannot be read.
    """
    for chunk in read_chunks(info):
        if info.dtype != dtype:
            array = np.frombuffer(chunk, DTYPES[info.dtype])
            chunk = cast_array(info.key, array, dtype).view(np.uint8).data
        yield chunk


def read_quantized_chunks(info: TensorInfo, group: int | None) -> Iterator[memoryview]:
    """Quantize a matrix with `quantize_rows`, and yield the numbers in chunks as they are stored.

    Args:
      info: The matrix [o, i].
      group: Number of inputs per int4 scale; None for int8.

    Raises:
      CheckpointError, OSError: The matrix cannot be read, as in `read_cast_chunks`.
    """
    for rows in _read_rows(info):
        q, _ = quantize_rows(rows, group)
        yield from split_array(q if group is None else pack_int4(q))


def read_scale_chunks(info: TensorInfo, group: int | None) -> Iterator[memoryview]:
    """Yield the scales of a matrix in chunks. The arguments are as in `read_quantized_chunks`.

    Raises:
      CheckpointError, OSError: The matrix cannot be read, as in `read_cast_chunks`.
    """
    scales = [row_scales(rows, group) for rows in _read_rows(info)]
    return split_array(np.concatenate(scales, axis=-1))


def _read_rows(info: TensorInfo) -> Iterator[np.ndarray]:
    """Yield the rows of a matrix in blocks of about the size of a chunk."""
    row_bytes = info.shape[1] * ITEM_BYTES[info.dtype]
    for chunk in read_chunks(info, size=max(1, CHUNK_BYTES // row_bytes) * row_bytes):
        yield np.frombuffer(chunk, DTYPES[info.dtype]).reshape(-1, info.shape[1])


def read_repacked_chunks(info: TensorInfo) -> Iterator[memoryview]:
    """Yield a GPTQ matrix in chunks, converted to the packing of `pack_int4`.

    Args:
      info: The tensor `qweight` int32 [i / 8, o].

    Raises:
      CheckpointError, OSError: The matrix cannot be read, as in `read_cast_chunks`.
    """
    return split_array(repack_gptq(view_tensor(map_file(info.path), info)))


def read_merged_chunks(
    info: TensorInfo, a: Array, b: Array, scale: float, dtype: str
) -> Iterator[memoryview]:
    """Yield the bytes of a matrix with its LoRA adapter merged: w + scale * b a, in float32.

    Args:
      info: The matrix w [out, in].
      a: The adapter's matrix a [rank, in].
      b: The adapter's matrix b [out, rank].
      scale: Factor by which b a is multiplied.
      dtype: Dtype of the result: "F32", "F16" or "BF16".

    Raises:
      CheckpointError, OSError: The matrix cannot be read or cast, as in `read_cast_chunks`.
    """
    stored = np.frombuffer(b"".join(map(bytes, read_chunks(info))), DTYPES[info.dtype])
    w = jnp.asarray(stored.reshape(info.shape).astype(np.float32))
    merged = np.asarray(LowRank(w, a * scale, b).merged())
    return split_array(cast_array(info.key, merged, dtype))


def zero_chunks(size: int) -> Iterator[memoryview]:
    """Yield `size` zero bytes in chunks."""
    starts = range(0, size, CHUNK_BYTES)
    return (memoryview(bytes(min(CHUNK_BYTES, size - start))) for start in starts)
