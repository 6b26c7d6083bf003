"""Exporting LoRA adapters as a folder that the PyTorch library `peft` reads."""

from pathlib import Path
from typing import Any

import numpy as np

from ovis_jax.checkpoint.adapters import load_adapters
from ovis_jax.checkpoint.conversion_record import CONVERSION_FILE, is_converted
from ovis_jax.checkpoint.file_io import write_json
from ovis_jax.checkpoint.key_map import make_hub_key_map
from ovis_jax.checkpoint.output_dirs import atomic_dir, require_empty
from ovis_jax.checkpoint.params import safetensors_dtype
from ovis_jax.checkpoint.resolve import ResolvedCheckpoint, find_folder_or_bundled_checkpoint
from ovis_jax.checkpoint.safetensors_writer import cast_array, save_arrays
from ovis_jax.config import OvisConfig
from ovis_jax.json_fields import read_json

PEFT_CONFIG_FILE = "adapter_config.json"
PEFT_WEIGHTS_FILE = "adapter_model.safetensors"

_PEFT_NAMES = {"lora_a": "lora_A", "lora_b": "lora_B"}


def export_peft_adapter(
    src: str | Path, dst: str | Path, lora: str | Path, *, dtype: str = "float32"
) -> dict[str, Any]:
    """Write LoRA adapters as a PEFT folder, which appears when it is complete.

    Args:
      src: folder of the base model in either layout, or the name of a bundled checkpoint; only its
        configs are read.
      dst: folder to create; it must not exist or be empty.
      lora: folder of the adapters.
      dtype: dtype of the tensors: "float32", "bfloat16" or "float16".

    Returns:
      The content of adapter_config.json.

    Raises:
      ConfigError: a config of `src` is missing or not supported.
      CheckpointError: the adapters belong to a model of another config; all faults are reported.
      OvisError: `src` is not a folder, `lora` has no adapters, or `dst` is not empty.
      OSError: a file cannot be read or written.
    """
    dst = Path(dst)
    require_empty(dst)
    base = find_folder_or_bundled_checkpoint(src, "give the base model of the adapters")
    config = OvisConfig.from_folder(base.folder)
    adapters = load_adapters(lora, config)
    keys = {path: key for key, path in make_hub_key_map(config).parameters.items()}
    modules = {path: keys[path].removesuffix(".weight") for path in adapters.matrix_paths}
    target = safetensors_dtype(dtype)
    arrays = {
        f"base_model.model.{module}.{name}.weight": cast_array(
            path, np.asarray(adapters.weights[f"{path}/{factor}"]), target
        )
        for path, module in modules.items()
        for factor, name in _PEFT_NAMES.items()
    }
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _base_model_name(base),
        "r": adapters.rank,
        "lora_alpha": adapters.scale * adapters.rank,
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
    """Return the source that conversion.json records, or else the name of the checkpoint."""
    folder = base.folder
    source = read_json(folder / CONVERSION_FILE).get("source") if is_converted(folder) else None
    name = source.get("name") if isinstance(source, dict) else None
    return name if isinstance(name, str) else base.name
