"""Exporting LoRA adapters to the folder format of the PyTorch library PEFT."""

from pathlib import Path
from typing import Any

import numpy as np

from ovis_jax.checkpoint.adapters import load_adapters
from ovis_jax.checkpoint.conversion_record import CONVERSION_FILE, is_converted
from ovis_jax.checkpoint.file_io import write_json
from ovis_jax.checkpoint.output_dirs import atomic_dir, require_empty
from ovis_jax.checkpoint.params import safetensors_dtype
from ovis_jax.checkpoint.peft_adapters import PEFT_WEIGHTS_FILE, find_peft_modules, peft_keys
from ovis_jax.checkpoint.resolve import (
    PEFT_CONFIG_FILE,
    ResolvedCheckpoint,
    find_folder_or_bundled_checkpoint,
)
from ovis_jax.checkpoint.safetensors_writer import cast_array, save_arrays
from ovis_jax.config import OvisConfig
from ovis_jax.json_fields import read_json


def export_peft_adapter(
    src: str | Path, dst: str | Path, adapters: str | Path, *, dtype: str = "float32"
) -> dict[str, Any]:
    """Write LoRA adapters to a PEFT folder, which appears only when it is complete.

    Args:
      src: Folder of the base model in either layout, or the name of a bundled checkpoint; only its
        configs are read.
      dst: Folder to create; it must either not exist or be empty.
      adapters: Folder that contains the adapters.
      dtype: Dtype of the tensors: "float32", "bfloat16" or "float16".

    Returns:
      The content of adapter_config.json.

    Raises:
      ConfigError: A config of `src` is missing or not supported.
      CheckpointError: The adapters belong to a model with a different config; the error lists all
        faults.
      OvisError: `src` is not a folder, `adapters` contains no adapters, or `dst` is not empty.
      OSError: A file cannot be read or written.
    """
    dst = Path(dst)
    require_empty(dst)
    base = find_folder_or_bundled_checkpoint(src, "give the base model of the adapters")
    config = OvisConfig.from_folder(base.folder)
    loaded = load_adapters(adapters, config)
    names = find_peft_modules(config)
    modules = {path: names[path] for path in loaded.matrix_paths}
    target = safetensors_dtype(dtype)
    arrays = {
        key: cast_array(path, np.asarray(loaded.weights[path]), target)
        for matrix, module in modules.items()
        for path, key in peft_keys(matrix, module).items()
    }
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _base_model_name(base),
        "r": loaded.rank,
        "lora_alpha": loaded.scale * loaded.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(modules.values()),
    }
    with atomic_dir(dst) as partial:
        save_arrays(partial / PEFT_WEIGHTS_FILE, arrays, {"format": "pt"})
        write_json(partial / PEFT_CONFIG_FILE, adapter_config)
    return adapter_config


def _base_model_name(base: ResolvedCheckpoint) -> str:
    """Return the source recorded in conversion.json, or else the name of the checkpoint."""
    folder = base.folder
    source = read_json(folder / CONVERSION_FILE).get("source") if is_converted(folder) else None
    name = source.get("name") if isinstance(source, dict) else None
    return name if isinstance(name, str) else base.name
