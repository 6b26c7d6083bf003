"""Saving LoRA adapters in a separate folder with their base model's config, and loading them.

Adapters that PEFT wrote can be loaded, too. Their rank and scale may differ between matrices.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from ovis_jax.checkpoint.checkpoint_problems import CheckpointProblem, CheckpointValidationError
from ovis_jax.checkpoint.file_io import write_json
from ovis_jax.checkpoint.key_map import find_tensor_problems
from ovis_jax.checkpoint.output_dirs import atomic_dir, check_disk_space
from ovis_jax.checkpoint.params import index_arrays, put_on_devices, remove_padding
from ovis_jax.checkpoint.peft_adapters import (
    PEFT_WEIGHTS_FILE,
    PeftConfig,
    find_peft_modules,
    peft_keys,
)
from ovis_jax.checkpoint.resolve import ADAPTER_CONFIG_FILE, PEFT_CONFIG_FILE
from ovis_jax.checkpoint.safetensors_reader import (
    SafetensorsHeader,
    map_file,
    read_header,
    view_tensor,
)
from ovis_jax.checkpoint.safetensors_writer import save_arrays
from ovis_jax.config import OvisConfig
from ovis_jax.errors import CheckpointError, OvisError
from ovis_jax.global_arrays import gather_array, is_global
from ovis_jax.json_fields import JsonObject, read_json
from ovis_jax.sharding import (
    TENSOR,
    Rules,
    adapter_axes,
    adapter_shapes,
    adapter_shardings,
    axis_letter_sizes,
    shape_from_axes,
)
from ovis_jax.user_files import describe_missing_file

ADAPTER_WEIGHTS_FILE = "adapters.safetensors"
ADAPTER_FORMAT_VERSION = 2


@dataclass(frozen=True)
class LoraAdapters:
    """LoRA adapters that all have the same rank; each adds scale * b a to its matrix.

    Attributes:
      weights: Float32 arrays by name, two for each matrix `path`: `path/lora_a` [rank, in] and
        `path/lora_b` [out, rank].
      rank: The rank of all adapters.
      scale: Factor by which the products b a are multiplied.
    """

    weights: dict[str, jax.Array]
    rank: int
    scale: float

    @property
    def matrix_paths(self) -> list[str]:
        """The paths of the matrices that have an adapter."""
        return [path.removesuffix("/lora_a") for path in self.weights if path.endswith("/lora_a")]


@dataclass(frozen=True)
class _StoredAdapters:
    """How a folder stores adapters.

    Attributes:
      file: Name of the file with the weights.
      keys: Keys in the file, by path, of all adapter arrays that the model can have.
      dtype: Dtype of the weights in the file; None if any dtype of parameters is allowed.
      rank: Function that returns the rank of a matrix's adapter, given the matrix's path.
      scale: Function that returns the scale of a matrix's adapter, given the matrix's path.
      targets: Function that returns whether a matrix's adapter is used, given the matrix's path.
    """

    file: str
    keys: Mapping[str, str]
    dtype: str | None
    rank: Callable[[str], int]
    scale: Callable[[str], float]
    targets: Callable[[str], bool] = lambda _: True


def save_adapters(
    folder: str | Path, weights: Mapping[str, Any], config: OvisConfig, *, scale: float
) -> None:
    """Write LoRA adapters to a folder, which appears only when it is complete.

    If arrays are on the devices of several processes, all processes must call this function, and
    process 0 writes.

    Args:
      folder: Folder to create; it must either not exist or be empty.
      weights: Float32 arrays by name, two for each matrix `path`: `path/lora_a` [rank, in] and
        `path/lora_b` [out, rank].
      config: Config of the base model.
      scale: Factor by which the products b a are multiplied.

    Raises:
      CheckpointError: The weights are not adapters for matrices of `config`, or their ranks differ.
      OvisError: The folder is not empty, or the scale is not above 0.
      OSError: The disk has too little space, or a file cannot be written.
    """
    folder = Path(folder)
    if not (math.isfinite(scale) and scale > 0):
        raise OvisError(f"adapters: scale is {scale!r}, expected a number above 0")
    weights = remove_padding(weights, adapter_axes(config), config)
    index = index_arrays("adapters", weights)
    ranks = [x.shape[0] for x in index.tensors if x.key.endswith("/lora_a") and x.shape]
    rank = max(ranks, key=ranks.count, default=0)  # the most frequent; all others are faults
    header = SafetensorsHeader(index.tensors, index.unusable_keys, index.problems)
    stored = _own_format("adapters", config, rank, scale)
    _check_adapters("adapters", stored, header, config)
    config_json, _ = config.to_hf()
    record = {
        "format": ADAPTER_FORMAT_VERSION,
        "rank": rank,
        "scale": float(scale),
        "config": config_json,
    }
    several = any(map(is_global, weights.values()))
    arrays = {path: gather_array(x) for path, x in weights.items()}
    if several and jax.process_index() > 0:
        return
    check_disk_space(folder, sum(x.nbytes for x in weights.values()))
    with atomic_dir(folder) as partial:
        save_arrays(partial / ADAPTER_WEIGHTS_FILE, arrays)
        write_json(partial / ADAPTER_CONFIG_FILE, record)


def load_adapters(
    folder: str | Path,
    config: OvisConfig,
    *,
    mesh: Mesh | None = None,
    rules: Rules = TENSOR,
) -> LoraAdapters:
    """Load adapters from a folder that `save_adapters` or PEFT wrote.

    PEFT's adapters may have several ranks and scales. They are padded with zeros to the largest
    rank, and their scales are multiplied into `lora_a`; the products stay the same.

    Args:
      folder: Folder of adapters.
      config: Config of the base model.
      mesh: Mesh over which the adapters are sharded in the same way as their matrices; None for the
        default device.
      rules: Sharding rules for the mesh.

    Raises:
      CheckpointError: The adapters belong to a model with a different config, or the tensors are
        not complete adapters with the recorded rank. The error lists all faults.
      ConfigError: The file adapters.json or adapter_config.json cannot be read, lacks a field, or
        requires anything but LoRA on matrices.
      OvisError: `folder` contains no adapters, or the rules cannot shard them over the mesh.
      OSError: A file cannot be read.
    """
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        rank, scale = _read_adapter_config(folder, config)
        stored = _own_format(ADAPTER_WEIGHTS_FILE, config, rank, scale)
    elif (folder / PEFT_CONFIG_FILE).is_file():
        stored = _peft_format(PeftConfig.from_folder(folder), config)
    else:
        found = f"it has no {ADAPTER_CONFIG_FILE} and no {PEFT_CONFIG_FILE}"
        found = found if folder.is_dir() else "it is not a folder"
        raise OvisError(
            f"adapters {folder}: {found}; give a folder that ovis-jax train, save_adapters or PEFT"
            " wrote"
        )
    path = folder / stored.file
    if path.is_file():
        header = read_header(path)
    else:
        row = CheckpointProblem(stored.file, "", "missing file", "a file", _explain_missing(path))
        header = SafetensorsHeader(problems=(row,), readable=False)
    _check_adapters(f"adapters {folder}", stored, header, config)
    arrays, rank, scale = _read_arrays(path, header, stored)
    shardings = {} if mesh is None else adapter_shardings(config, mesh, rules)
    shapes = adapter_shapes(config, rank, mesh, rules)
    weights = {
        key: put_on_devices(key, array, "F32", shardings.get(key), shapes[key])
        for key, array in arrays.items()
    }
    return LoraAdapters(weights, rank, scale)


def _own_format(file: str, config: OvisConfig, rank: int, scale: float) -> _StoredAdapters:
    """Return the format that `save_adapters` writes, in which the keys are the paths."""
    keys = {path: path for path in adapter_axes(config)}
    return _StoredAdapters(file, keys, "F32", lambda _: rank, lambda _: scale)


def _peft_format(peft: PeftConfig, config: OvisConfig) -> _StoredAdapters:
    modules = find_peft_modules(config)
    keys = {
        factor: key
        for path, module in modules.items()
        for factor, key in peft_keys(path, module).items()
    }
    return _StoredAdapters(
        PEFT_WEIGHTS_FILE,
        keys,
        None,
        lambda path: peft.rank(modules[path]),
        lambda path: peft.scale(modules[path]),
        lambda path: peft.targets(modules[path]),
    )


def _explain_missing(path: Path) -> str:
    if (pickle := path.with_suffix(".bin")).is_file():
        return (
            f"{pickle.name}, a pickle file of PyTorch; load the adapters with PEFT and save them"
            " with save_pretrained, which writes safetensors"
        )
    return describe_missing_file(path)


def _read_arrays(
    file: Path, header: SafetensorsHeader, stored: _StoredAdapters
) -> tuple[dict[str, np.ndarray], int, float]:
    """Read checked adapters as float32, and convert them to a common rank and scale.

    Returns:
      The arrays by path in sorted order, the common rank, and the common scale.
    """
    mapped, infos = map_file(file), {info.key: info for info in header.tensors}
    found = sorted(path for path, key in stored.keys.items() if key in infos)
    matrices = {path: path.rpartition("/")[0] for path in found}
    rank = max(map(stored.rank, matrices.values()))
    scales = {matrix: stored.scale(matrix) for matrix in matrices.values()}
    scale = scales[matrices[found[0]]] if len({*scales.values()}) == 1 else 1.0
    arrays = {}
    for path, matrix in matrices.items():
        array = view_tensor(mapped, infos[stored.keys[path]]).astype(np.float32)
        axis = 0 if path.endswith("/lora_a") else 1
        if axis == 0 and scales[matrix] != scale:
            array *= np.float32(scales[matrix])
        pads = [(0, 0), (0, 0)]
        pads[axis] = 0, rank - array.shape[axis]
        arrays[path] = np.pad(array, pads)
    return arrays, rank, scale


def _read_adapter_config(folder: Path, config: OvisConfig) -> tuple[int, float]:
    """Read the rank and the scale, and check that the adapters were trained with this config."""
    path = folder / ADAPTER_CONFIG_FILE
    record = JsonObject(read_json(path), str(path))
    if (found := record.get("format")) != ADAPTER_FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format is {found!r}, expected {ADAPTER_FORMAT_VERSION}; save the adapters"
            " again with this version of ovis_jax"
        )
    rank, scale = record.get_positive_int("rank"), record.get_positive_number("scale")
    expected = _architecture_fields(config.to_hf()[0])
    stated = _architecture_fields(dict(record.get_object("config").values))
    problems = [
        CheckpointProblem(
            ADAPTER_CONFIG_FILE,
            f"config: {key}",
            "another config",
            repr(value),
            repr(stated.get(key)),
        )
        for key, value in expected.items()
        if stated.get(key) != value
    ]
    if problems:
        advice = "give the checkpoint that they were trained with, or adapters of this one"
        raise CheckpointValidationError(f"adapters {folder}", problems, advice)
    return rank, scale


def _architecture_fields(config_json: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json that affect the matrices, without token ids and lengths."""
    flat: dict[str, Any] = flatten_dict(config_json, sep=".")
    return {
        key: value
        for key, value in flat.items()
        if key.startswith(("llm_config.", "visual_tokenizer_config."))
        and not key.endswith("_token_id")
    }


def _check_adapters(
    subject: str, stored: _StoredAdapters, header: SafetensorsHeader, config: OvisConfig
) -> None:
    """Check that the tensors are complete adapters for the matrices of the model.

    Raises:
      CheckpointValidationError: The tensors have faults; the error lists all of them.
    """
    problems = list(header.problems)
    axes = adapter_axes(config)
    paths = {key: path for path, key in stored.keys.items()}
    known = {info.key for info in header.tensors} | header.unusable_keys

    def report(key: str, problem: str, expected: str, found: str) -> None:
        problems.append(CheckpointProblem(stored.file, key, problem, expected, found))

    for info in header.tensors:
        if info.key not in paths:
            example = next(iter(paths))
            expected = f"a matrix that can have an adapter, with a key such as {example}"
            report(info.key, "unknown key", expected, f"{info.dtype} {list(info.shape)}")
            continue
        path = paths[info.key]
        matrix, _, factor = path.rpartition("/")
        if not stored.targets(matrix):
            expected = "a module that target_modules and the fields next to it select"
            report(info.key, "not a target module", expected, "another module")
            continue
        sizes = axis_letter_sizes(config, path) | {"R": stored.rank(matrix)}
        problems += find_tensor_problems(info, axes[path], sizes, stored.dtype)
        other = f"{matrix}/{'lora_b' if factor == 'lora_a' else 'lora_a'}"
        if stored.keys[other] not in known:
            shape = list(shape_from_axes(axes[other], sizes))
            expected = f"{shape} {axes[other]!r}, as for {info.key}"
            report(stored.keys[other], "missing key", expected, "no such tensor")
    if not known and not problems:
        report("", "no adapters", "two tensors for each matrix", "none")
    if problems:
        raise CheckpointValidationError(subject, problems, "save the adapters again")
