"""Low-rank adapters for the PyTorch side: the layout of a folder that the `peft` library reads."""

from pathlib import Path
from typing import Any

import numpy as np

from ovis_jax.checkpoint.adapters import load_adapters
from ovis_jax.checkpoint.keymap import hub_keys
from ovis_jax.checkpoint.params import dtype_name, is_converted
from ovis_jax.checkpoint.safetensors_stream import write_file
from ovis_jax.checkpoint.writer import (
    CONVERSION_FILE,
    array_pieces,
    cast,
    check_destination,
    whole_or_absent,
    write_json,
)
from ovis_jax.config import OvisConfig
from ovis_jax.errors import OvisError
from ovis_jax.fields import read_json

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"

_HALVES = {"a": "lora_A", "b": "lora_B"}


def export_adapters(
    src: str | Path, dst: str | Path, lora: str | Path, *, dtype: str = "float32"
) -> dict[str, Any]:
    """Write adapters as a PEFT folder, which appears when it is complete.

    `src` is the checkpoint that the adapters in `lora` were trained beside, in either layout; only
    its configs are read. `dtype` is that of the tensors. Returns what adapter_config.json says.

    Raises:
      ConfigError: a config of `src` is missing or not supported.
      CheckpointError: the adapters are not those of a model of that config; names every fault.
      OvisError: `src` is not a folder, `lora` holds no adapters, or `dst` exists and is not an
        empty folder.
      OSError: a file cannot be read or written.
    """
    src, dst = Path(src), Path(dst)
    check_destination(dst)
    if not src.is_dir():
        raise OvisError(f"{src} is not a folder; give the checkpoint that the adapters belong to")
    config = OvisConfig.from_folder(src)
    adapters = load_adapters(lora, config)
    keys = {path: key for key, path in hub_keys(config).parameters.items()}
    modules = {path: keys[path].removesuffix(".weight") for path in adapters.matrices}
    halves = {
        f"base_model.model.{module}.{name}.weight": adapters.halves[f"{path}/{half}"]
        for path, module in modules.items()
        for half, name in _HALVES.items()
    }
    target = dtype_name(dtype)
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _base_name(src),
        "r": adapters.rank,
        "lora_alpha": adapters.scale * adapters.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(modules.values()),
    }
    with whole_or_absent(dst) as partial:
        write_file(
            partial / TENSORS_FILE,
            {key: (target, half.shape) for key, half in halves.items()},
            lambda key: array_pieces(cast(key, np.asarray(halves[key]), target)),
            {"format": "pt"},
        )
        write_json(partial / CONFIG_FILE, record)
    return record


def _base_name(src: Path) -> str:
    """What a folder was converted from, where it says so, else its own name."""
    origin = read_json(src / CONVERSION_FILE).get("source") if is_converted(src) else None
    name = origin.get("name") if isinstance(origin, dict) else None
    return name if isinstance(name, str) else src.resolve().name
