"""The quantization of a checkpoint: the quantized matrices, their groups, and the rounding.

int8 has one scale per row of a matrix, that is, per output. int4 has one scale per row and group of
consecutive inputs, and only applies to the seven matrices of each decoder block. The other matrices
are int8 or, in a checkpoint that GPTQ has quantized, not quantized. Norms, biases, the patch
embedding and the position embedding are not quantized.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ovis_jax.config import OvisConfig
from ovis_jax.errors import OvisError
from ovis_jax.sharding import (
    axis_letter_sizes,
    param_axes,
    shape_from_axes,
    split_dimensions,
    supports_adapter,
)

QuantizationFormat = Literal["int8", "int4"]

_GROUP_SIZES = (128, 64, 32, 16, 8)
"""Group sizes in order of preference. The first size that divides all inputs is used."""

_INT4_MATRICES = re.compile(r"decoder/block_\d+/(attn/[qkvo]|mlp/(gate|up|down))")
_TABLES = ("visual_embedding", "decoder/embed")


@dataclass(frozen=True)
class Quantization:
    """The quantization of all matrices of a checkpoint.

    Attributes:
      format: "int8" or "int4".
      group_size: Number of inputs per scale of an int4 matrix; None for "int8".
      decoder_only: Whether only the int4 matrices of the decoder's blocks are quantized, as in GPTQ
        checkpoints. Otherwise, all other matrices are int8.
    """

    format: QuantizationFormat
    group_size: int | None = None
    decoder_only: bool = False

    def __str__(self) -> str:
        groups = "" if self.group_size is None else f" in groups of {self.group_size}"
        return f"{self.format}{groups}"

    def group_of(self, path: str) -> int | None:
        """Return the group size of a matrix; None if the matrix is int8."""
        return self.group_size if _INT4_MATRICES.fullmatch(path) else None


def describe_formats(quantization: Quantization | None, dtype: str) -> str:
    """Return the formats of all tensors, such as "int8 and bfloat16".

    Args:
      quantization: The quantization; None for a checkpoint that is not quantized.
      dtype: Name of the dtype of the tensors that are not quantized.
    """
    if quantization is None:
        return dtype
    others = "" if quantization.format == "int8" or quantization.decoder_only else ", int8"
    return f"{quantization}{others} and {dtype}"


def choose_quantization(config: OvisConfig, quantization: str) -> Quantization:
    """Return the quantization for a format; int4 uses the largest group size that is possible.

    Raises:
      OvisError: The format is unknown, or no group size divides the inputs of every matrix.
    """
    if quantization not in get_args(QuantizationFormat):
        known = " or ".join(get_args(QuantizationFormat))
        raise OvisError(f"quantization {quantization!r}: expected {known}")
    if quantization == "int8":
        return Quantization("int8")
    for group_size in _GROUP_SIZES:
        found = Quantization("int4", group_size)
        if not find_undivided(config, found):
            return found
    path, inputs = find_undivided(config, Quantization("int4", _GROUP_SIZES[-1]))[0]
    raise OvisError(
        f"quantization int4: {path} has {inputs} inputs, which groups of {_GROUP_SIZES[-1]} do not"
        " divide; use int8"
    )


def find_undivided(config: OvisConfig, quantization: Quantization) -> list[tuple[str, int]]:
    """Return path and number of inputs of every matrix that the group size does not divide."""
    inputs = {path: shape[1] for path, shape in quantized_matrices(config, quantization).items()}
    return [(p, n) for p, n in inputs.items() if n % (quantization.group_of(p) or 1)]


def quantized_matrices(
    config: OvisConfig, quantization: Quantization | None
) -> dict[str, tuple[int, ...]]:
    """Return the shape [o, i] of every quantized matrix, by path."""
    if quantization is None:
        return {}
    return {
        path: shape_from_axes(axes, axis_letter_sizes(config, path))
        for path, axes in param_axes(config).items()
        if _INT4_MATRICES.fullmatch(path)
        or not quantization.decoder_only
        and (supports_adapter(path) or path in _TABLES)
    }


def stored_tensors(
    config: OvisConfig, quantization: Quantization | None
) -> dict[str, tuple[str, str | None]]:
    """Return the axes and the dtype of every tensor in a converted folder, by name.

    A quantized matrix has two tensors. `path` is I8 [o, i], or U8 [o, i / 2] with two int4 numbers
    per byte, the first in the lower four bits. `path/scale` is F32 [o], or F32 [G, o].

    Args:
      config: Config of the model.
      quantization: The quantization; None for a folder that is not quantized.

    Returns:
      Axes as in `param_axes`, and the safetensors name of the dtype; None for the dtype of the
      checkpoint.
    """
    matrices = quantized_matrices(config, quantization)
    tensors: dict[str, tuple[str, str | None]] = {}
    for path, axes in param_axes(config).items():
        if quantization is None or path not in matrices:
            tensors[path] = axes, None
            continue
        rows, _ = split_dimensions(axes)
        inputs, group = matrices[path][1], quantization.group_of(path)
        if group is None:
            tensors |= {path: (axes, "I8"), scale_path(path): (rows, "F32")}
        else:
            tensors[path] = f"{rows} {inputs // 2}", "U8"
            tensors[scale_path(path)] = f"{inputs // group} {rows}", "F32"
    return tensors


def stored_specs(
    config: OvisConfig, quantization: Quantization | None, dtype: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype and the shape of every tensor in a converted folder, by name.

    Args:
      config: Config of the model.
      quantization: The quantization, as for `stored_tensors`.
      dtype: Safetensors name of the dtype of the tensors that are not quantized.
    """
    return {
        name: (own_dtype or dtype, shape_from_axes(axes, axis_letter_sizes(config, name)))
        for name, (axes, own_dtype) in stored_tensors(config, quantization).items()
    }


def scale_path(path: str) -> str:
    """Return the name of the tensor with the scales of a matrix."""
    return f"{path}/scale"


def quantized_shardings(
    path: str, sharding: NamedSharding, num_groups: int | None
) -> tuple[NamedSharding, NamedSharding]:
    """Return the shardings of a quantized matrix's numbers and scales.

    Args:
      path: Path of the matrix.
      sharding: Sharding of the matrix [o, i], as in `param_shardings`.
      num_groups: G, the number of groups of an int4 matrix; None for int8.

    Raises:
      OvisError: The mesh would split a group.
    """
    mesh, (rows, inputs, *_) = sharding.mesh, (*sharding.spec, None, None)
    if num_groups is None:
        return sharding, NamedSharding(mesh, PartitionSpec(rows))
    if inputs is not None and num_groups % mesh.shape[inputs]:
        raise OvisError(
            f"{path}: mesh axis {inputs!r} of size {mesh.shape[inputs]} would cut one of the"
            f" {num_groups} groups of an int4 matrix; use a size that divides {num_groups}, rules"
            " that do not shard the inputs, or int8"
        )
    groups_and_rows = NamedSharding(mesh, PartitionSpec(inputs, rows))
    return groups_and_rows, groups_and_rows


def quantize_rows(rows: np.ndarray, group: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Quantize rows of a matrix to the nearest numbers.

    An int8 row uses -127 to 127. The int4 number of largest magnitude in a group becomes -8, so the
    scale may be negative. In this way, all 16 numbers are used, as in ggml's Q4_0.

    Args:
      rows: Floating-point rows [n, i].
      group: Number of inputs per int4 scale; None for int8.

    Returns:
      int8 [n, i] and float32 scales [n]; or int4 [G, n, g] and float32 scales [G, n].
    """
    x = _split_groups(rows, group)
    scale, inverse = _scales_and_inverses(x)
    with np.errstate(invalid="ignore"):
        np.multiply(x, inverse[..., None], out=x)
        np.rint(x, out=x)
        np.minimum(x, 127 if group is None else 7, out=x)
        q = x.astype(np.int8)
    return q if group is None else q.astype(ml_dtypes.int4), scale


def row_scales(rows: np.ndarray, group: int | None) -> np.ndarray:
    """Return only the scales of `quantize_rows`, float32 [n] or [G, n]."""
    return _scales_and_inverses(_split_groups(rows, group))[0]


def _split_groups(rows: np.ndarray, group: int | None) -> np.ndarray:
    """Return a float32 copy of rows [n, i], as [G, n, g] if there are groups."""
    x = rows.astype(np.float32)
    return x if group is None else x.reshape(len(x), -1, group).swapaxes(0, 1)


def _scales_and_inverses(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale of each row [n, i], or of each row of a group [G, n, g], and its inverse.

    Both are 0 if all numbers are too small. The scale is not finite if any number is not finite.
    """
    high, low = x.max(axis=-1), x.min(axis=-1)
    with np.errstate(divide="ignore", over="ignore"):
        if x.ndim == 2:
            scale = np.maximum(high, -low) / np.float32(127)
        else:
            scale = np.where(high > -low, high, low) / np.float32(-8)
        inverse = np.float32(1) / scale
    too_small = np.isinf(inverse)
    scale[too_small] = inverse[too_small] = 0
    return scale, inverse


def pack_int4(q: np.ndarray) -> np.ndarray:
    """Pack int4 [G, n, g] into uint8 [n, G g / 2]; the lower bits hold the first of two numbers."""
    pairs = q.astype(np.int8).swapaxes(0, 1).reshape(q.shape[1], -1, 2).view(np.uint8)
    return (pairs[..., 0] & 15) | (pairs[..., 1] << 4)


def unpack_int4(packed: np.ndarray, group: int) -> np.ndarray:
    """Return the int4 [G, n, g] that `pack_int4` packed."""
    packed = packed.view(np.int8)
    low, high = (packed << 4) >> 4, packed >> 4  # arithmetic shifts keep the sign
    q = np.stack([low, high], axis=-1).astype(ml_dtypes.int4)
    return q.reshape(len(packed), -1, group).swapaxes(0, 1)
