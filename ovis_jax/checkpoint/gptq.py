"""Reading folders that AutoGPTQ quantized, such as AIDC-AI/Ovis1.6-Gemma2-9B-GPTQ-Int4.

GPTQ (Frantar et al. 2022) quantizes only the seven matrices of each decoder block. AutoGPTQ
replaces a matrix [o, i] by four tensors, with groups of g consecutive inputs:

- `qweight` int32 [i / 8, o]: eight consecutive inputs per 32-bit word, with the first input in the
  lowest four bits.
- `scales` [i / g, o], in any floating-point dtype.
- `qzeros` int32 [i / g, o / 8]: eight zero points per 32-bit word, each reduced by 1.
- `g_idx` int32 [i]: the group of each input.

The matrix is scale * (code - zero). Only symmetric zero points (8) and groups in the order of the
inputs are supported. A code minus 8 is then a number of an int4 matrix, so nothing is rounded.
"""

from pathlib import Path

import numpy as np

from ovis_jax.checkpoint.checkpoint_problems import CheckpointProblem, CheckpointValidationError
from ovis_jax.checkpoint.key_map import KeyMap, MatchedTensors, make_hub_key_map
from ovis_jax.checkpoint.resolve import GPTQ_CONFIG_FILE
from ovis_jax.checkpoint.safetensors_reader import (
    DTYPES,
    INTEGER_DTYPES,
    TensorInfo,
    map_file,
    view_tensor,
)
from ovis_jax.config import OvisConfig, read_gptq_group_size
from ovis_jax.errors import ConfigError
from ovis_jax.json_fields import JsonObject, read_json
from ovis_jax.quantization import Quantization, quantized_matrices, scale_path
from ovis_jax.sharding import param_axes, split_dimensions

_ADVICE = (
    "give a checkpoint that was quantized with sym true and desc_act false, or one that is not"
    " quantized"
)
CONSTANT_REASON = "these numbers are the same in all supported checkpoints of GPTQ"
_SYMMETRIC_ZEROS = 0x77777777  # eight zero points of 8, each minus 1
_BIAS_REASON = "the matrix has no bias, and AutoGPTQ writes zeros"


def read_gptq_quantization(folder: Path) -> Quantization | None:
    """Read the GPTQ settings of a folder in the Hub's layout; None if it has no such settings.

    The settings are in quantize_config.json, in `quantization_config` of config.json, or in both.

    Raises:
      ConfigError: A setting is missing or not supported, the two files state different group sizes,
        or a file cannot be read.
    """
    paths = [folder / "config.json", folder / GPTQ_CONFIG_FILE]
    config, stated = (JsonObject(read_json(x) if x.is_file() else {}, str(x)) for x in paths)
    stated = [stated] if stated.values else []
    if config.get_optional("quantization_config", None):
        stated.append(config.get_object("quantization_config"))
    group_sizes = {settings.name: read_gptq_group_size(settings) for settings in stated}
    if len({*group_sizes.values()}) > 1:
        found = " and ".join(f"{size} in {name}" for name, size in group_sizes.items())
        raise ConfigError(
            f"{folder}: group_size is {found}; keep the one in the weights' file name"
        )
    for group_size in group_sizes.values():
        return Quantization("int4", group_size, decoder_only=True)
    return None


def gptq_weights_file(quantization: Quantization) -> str:
    """Return the name of the file with the weights."""
    return f"gptq_model-4bit-{quantization.group_size}g.safetensors"


def make_gptq_key_map(config: OvisConfig, quantization: Quantization) -> KeyMap:
    """Return the key map for a folder that AutoGPTQ quantized."""
    hub, group = make_hub_key_map(config), quantization.group_size or 0
    keys = {path: key for key, path in hub.parameters.items()}
    matrices = quantized_matrices(config, quantization)
    parameters: dict[str, str] = {}
    tensors: dict[str, tuple[str, str | None]] = {}
    unused = dict(hub.unused)
    for path, axes in param_axes(config).items():
        if path not in matrices:
            parameters[keys[path]], tensors[path] = path, (axes, None)
            continue
        module, (rows, _) = keys[path].removesuffix(".weight"), split_dimensions(axes)
        outputs, inputs = matrices[path]
        for suffix, name, stored in (
            ("qweight", path, (f"{inputs // 8} {rows}", "I32")),
            ("scales", scale_path(path), (f"{inputs // group} {rows}", " ".join(DTYPES))),
            ("qzeros", f"{path}/qzeros", (f"{inputs // group} {outputs // 8}", "I32")),
            ("g_idx", f"{path}/g_idx", (f"{inputs}", "I32")),
        ):
            parameters[f"{module}.{suffix}"], tensors[name] = name, stored
        unused[f"{module}.bias"] = _BIAS_REASON
    return KeyMap(parameters, unused, tensors)


def gptq_constants(matched: MatchedTensors) -> list[tuple[TensorInfo, np.ndarray | int, str]]:
    """Return the tensors whose numbers are the same in all supported checkpoints.

    Returns:
      Each tensor, with its expected numbers and a description of these numbers. The list is empty
      for a folder that GPTQ did not quantize.
    """
    constants: list[tuple[TensorInfo, np.ndarray | int, str]] = []
    for name, info in matched.sources.items():
        path, _, kind = name.rpartition("/")
        if kind == "qzeros":
            constants.append((info, _SYMMETRIC_ZEROS, "zero points of 8, as with sym true"))
        elif kind == "g_idx":
            inputs, groups = info.shape[0], matched.sources[scale_path(path)].shape[0]
            order = np.arange(inputs) // (inputs // groups)
            constants.append((info, order, "groups in the order of inputs, as with desc_act false"))
    biases = [info for info, reason in matched.unused_found if reason == _BIAS_REASON]
    return constants + [(info, 0, f"zeros, in one of {', '.join(DTYPES)}") for info in biases]


def check_gptq_constants(matched: MatchedTensors) -> None:
    """Check the numbers of the tensors that `gptq_constants` returns.

    Raises:
      CheckpointValidationError: A tensor has different numbers; the error lists all such tensors.
      CheckpointError: A file has become shorter since its header was read.
      OSError: A file cannot be read.
    """
    problems = []
    for info, expected, description in gptq_constants(matched):
        found = info.dtype
        if info.dtype in {*DTYPES, *INTEGER_DTYPES}:
            values = view_tensor(map_file(info.path), info)
            if not (different := np.argwhere(values != expected)).size:
                continue
            place = tuple(different[0].tolist())
            value = values[place].item()
            found = f"{value & 0xFFFFFFFF:#x}" if values.ndim == 2 else str(value)
            found += f" at {list(place)}"
        row = (info.path.name, info.key, "unsupported numbers", description, found)
        problems.append(CheckpointProblem(*row))
    if problems:
        raise CheckpointValidationError(str(info.path.parent), problems, _ADVICE)


def repack_gptq(qweight: np.ndarray) -> np.ndarray:
    """Convert a matrix from AutoGPTQ's packing to that of `pack_int4`.

    Args:
      qweight: The matrix in AutoGPTQ's packing, int32 [i / 8, o].

    Returns:
      uint8 [o, i / 2], in a new array.
    """
    words = np.ascontiguousarray(qweight.T).astype("<i4", copy=False)
    packed = words.view(np.uint8)
    packed ^= 0x88  # in four bits, a code minus 8 is the code with its highest bit flipped
    return packed
