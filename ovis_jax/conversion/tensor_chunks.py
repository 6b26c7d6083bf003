"""Reading tensors in chunks for conversion and export, either cast or with LoRA adapters merged."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jax import Array

from ovis_jax.checkpoint.safetensors_reader import CHUNK_BYTES, DTYPES, TensorInfo, read_chunks
from ovis_jax.checkpoint.safetensors_writer import cast_array, split_array
from ovis_jax.model.linear import LowRank


def read_cast_chunks(info: TensorInfo, dtype: str) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in chunks, cast to a dtype; `read_chunks` describes the chunks.

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
