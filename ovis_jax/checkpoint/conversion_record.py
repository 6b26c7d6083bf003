"""The file conversion.json, which marks a converted folder and records how it was made."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ovis_jax.checkpoint.safetensors_reader import DTYPES
from ovis_jax.checkpoint.safetensors_writer import TensorSpecs
from ovis_jax.config import OvisConfig
from ovis_jax.errors import CheckpointError
from ovis_jax.json_fields import read_json
from ovis_jax.quantization import Quantization
from ovis_jax.sharding import param_shapes

CONVERSION_FILE = "conversion.json"
FORMAT_VERSION = 1

DTYPE_FIELDS = ("torch_dtype", "dtype")
"""Names of the dtype field in config.json, in transformers 4 and in transformers 5."""


def is_converted(folder: Path) -> bool:
    """Return whether this library wrote a folder, and so named its tensors by parameter path.

    Raises:
      CheckpointError: Another version of the library wrote the folder in a different format.
      ConfigError: The file conversion.json cannot be read.
    """
    path = folder / CONVERSION_FILE
    if not path.exists():
        return False
    found = read_json(path).get("format")
    if found != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format is {found!r}, expected {FORMAT_VERSION}; convert the checkpoint again"
            " with this version of ovis_jax"
        )
    return True


def read_quantization(folder: Path) -> Quantization | None:
    """Read a converted folder's quantization from conversion.json; None if it is not quantized.

    Raises:
      CheckpointError: The quantization is not known.
      ConfigError: The file conversion.json cannot be read.
    """
    path = folder / CONVERSION_FILE
    fields = read_json(path).get("quantization")
    if fields is None:
        return None
    match fields:
        case {"format": "int8", "group_size": None, "decoder_only": False}:
            return Quantization("int8")
        case {
            "format": "int4",
            "group_size": int(group_size),
            "decoder_only": bool(decoder_only),
        } if group_size > 0:
            return Quantization("int4", group_size, decoder_only)
    raise CheckpointError(
        f"{path}: quantization is {fields!r}, expected the format int8, or int4 with a group_size,"
        " and decoder_only; convert the checkpoint again"
    )


def make_conversion_record(
    config: OvisConfig,
    tensors: TensorSpecs,
    sha256: Mapping[str, str | None],
    dtype: str,
    quantization: Quantization | None = None,
    **provenance: Any,
) -> dict[str, Any]:
    """Return the content of conversion.json.

    Args:
      config: Config of the model.
      tensors: Dtypes and shapes of the written tensors.
      sha256: SHA-256 by file name.
      dtype: Dtype of the tensors that are not quantized: "F32", "F16" or "BF16".
      quantization: The quantization of the other tensors; None if no tensor is quantized.
      **provenance: Fields that describe the source.
    """
    return {
        "format": FORMAT_VERSION,
        **provenance,
        "versions": get_library_versions(),
        "dtype": DTYPES[dtype].name,
        **({} if quantization is None else {"quantization": asdict(quantization)}),
        "tensors": len(tensors),
        "parameters": sum(map(math.prod, param_shapes(config).values())),
        "sha256": {name: digest for name, digest in sha256.items() if digest is not None},
    }


def get_library_versions() -> dict[str, str]:
    """Return the versions of this package and of the libraries that it writes checkpoints with."""
    return {name: _get_version(name) for name in ("ovis-jax", "jax", "numpy", "ml-dtypes")}


def set_config_dtype(config_json: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a parsed config.json with a new dtype, both at the top level and for the decoder.

    The field is called `torch_dtype` in transformers 4 and `dtype` in transformers 5. The settings
    of GPTQ, which describe tensors in another layout, are left out.

    Args:
      config_json: The parsed config.json.
      dtype: "F32", "F16" or "BF16".
    """

    def with_dtype(fields: Mapping[str, Any]) -> dict[str, Any]:
        names = [name for name in DTYPE_FIELDS if name in fields] or DTYPE_FIELDS[:1]
        return {**fields, **dict.fromkeys(names, DTYPES[dtype].name)}

    kept = {name: value for name, value in config_json.items() if name != "quantization_config"}
    return {**with_dtype(kept), "llm_config": with_dtype(config_json["llm_config"])}


def _get_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
