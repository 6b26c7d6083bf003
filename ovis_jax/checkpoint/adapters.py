"""Saving and loading LoRA adapters in a separate folder, with the config of their base model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from safetensors.numpy import load_file

from ovis_jax.checkpoint.checkpoint_problems import CheckpointProblem, CheckpointValidationError
from ovis_jax.checkpoint.file_io import write_json
from ovis_jax.checkpoint.key_map import find_tensor_problems
from ovis_jax.checkpoint.output_dirs import atomic_dir, check_disk_space
from ovis_jax.checkpoint.params import index_arrays, put_on_devices, remove_padding
from ovis_jax.checkpoint.safetensors_reader import SafetensorsHeader, read_header
from ovis_jax.checkpoint.safetensors_writer import save_arrays
from ovis_jax.config import OvisConfig
from ovis_jax.errors import CheckpointError, OvisError
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

ADAPTER_WEIGHTS_FILE = "adapters.safetensors"
ADAPTER_CONFIG_FILE = "adapters.json"
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


def save_adapters(
    folder: str | Path, weights: Mapping[str, Any], config: OvisConfig, *, scale: float
) -> None:
    """Write LoRA adapters to a folder, which appears only when it is complete.

    Args:
      folder: Folder to create; it must either not exist or be empty.
      weights: Float32 arrays by name, two for each matrix `path`: `path/lora_a` [rank, in] and
        `path/lora_b` [out, rank].
      config: Config of the base model.
      scale: Factor by which the products b a are multiplied.

    Raises:
      CheckpointError: The weights are not adapters for matrices of `config`, or their ranks differ.
      OvisError: The folder is not empty, the scale is not above 0, or an array is not entirely on
        the devices of this host.
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
    _check_adapters("adapters", "adapters", header, config, rank)
    config_json, _ = config.to_hf()
    record = {
        "format": ADAPTER_FORMAT_VERSION,
        "rank": rank,
        "scale": float(scale),
        "config": config_json,
    }
    check_disk_space(folder, sum(x.nbytes for x in weights.values()))
    with atomic_dir(folder) as partial:
        arrays = {path: np.asarray(x) for path, x in weights.items()}
        save_arrays(partial / ADAPTER_WEIGHTS_FILE, arrays)
        write_json(partial / ADAPTER_CONFIG_FILE, record)


def load_adapters(
    folder: str | Path,
    config: OvisConfig,
    *,
    mesh: Mesh | None = None,
    rules: Rules = TENSOR,
) -> LoraAdapters:
    """Load the adapters from a folder that `save_adapters` wrote.

    Args:
      folder: Folder of adapters.
      config: Config of the base model.
      mesh: Mesh over which the adapters are sharded in the same way as their matrices; None for the
        default device.
      rules: Sharding rules for the mesh.

    Raises:
      CheckpointError: The adapters belong to a model with a different config, or the tensors are
        not complete adapters with the recorded rank. The error lists all faults.
      ConfigError: The file adapters.json cannot be read or lacks a field.
      OvisError: `folder` contains no adapters, or the rules cannot shard them over the mesh.
      OSError: A file cannot be read.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        found = f"it has no {ADAPTER_CONFIG_FILE}" if folder.is_dir() else "it is not a folder"
        raise OvisError(f"adapters {folder}: {found}; give a folder that save_adapters wrote")
    rank, scale = _read_adapter_config(folder, config)
    path = folder / ADAPTER_WEIGHTS_FILE
    if path.is_file():
        header = read_header(path)
    else:
        fault = "missing file", "a file", "no file of that name"
        row = CheckpointProblem(ADAPTER_WEIGHTS_FILE, "", *fault)
        header = SafetensorsHeader(problems=(row,), readable=False)
    _check_adapters(f"adapters {folder}", ADAPTER_WEIGHTS_FILE, header, config, rank)
    shardings = {} if mesh is None else adapter_shardings(config, mesh, rules)
    shapes = adapter_shapes(config, rank, mesh, rules)
    weights = {
        key: put_on_devices(key, array, "F32", shardings.get(key), shapes[key])
        for key, array in sorted(load_file(path).items())
    }
    return LoraAdapters(weights, rank, scale)


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
    subject: str, file: str, header: SafetensorsHeader, config: OvisConfig, rank: int
) -> None:
    """Check that the tensors are complete adapters for matrices of a config.

    Raises:
      CheckpointValidationError: The tensors have faults; the error lists all of them.
    """
    problems = list(header.problems)
    axes = adapter_axes(config)
    known = {info.key for info in header.tensors} | header.unusable_keys

    def report(key: str, problem: str, expected: str, found: str) -> None:
        problems.append(CheckpointProblem(file, key, problem, expected, found))

    for info in header.tensors:
        if info.key not in axes:
            expected = "path/lora_a or path/lora_b of a matrix that can have an adapter"
            report(info.key, "unknown key", expected, f"{info.dtype} {list(info.shape)}")
            continue
        sizes = axis_letter_sizes(config, info.key) | {"R": rank}
        problems += find_tensor_problems(info, axes[info.key], sizes, "F32")
        matrix, _, factor = info.key.rpartition("/")
        other = f"{matrix}/{'lora_b' if factor == 'lora_a' else 'lora_a'}"
        if other not in known:
            shape = list(shape_from_axes(axes[other], sizes))
            expected = f"{shape} {axes[other]!r}, as for {info.key}"
            report(other, "missing key", expected, "no such tensor")
    if not known and not problems:
        report("", "no adapters", "two tensors for each matrix", "none")
    if problems:
        raise CheckpointValidationError(subject, problems, "save the adapters again")
