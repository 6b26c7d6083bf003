"""Copies of the golden checkpoints, for conversion and for faults."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_LLAMA = Path(__file__).parent / "golden-llama"
CHECKPOINTS = ("tiny-f32", "tiny-bf16-sharded")
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, read by the safetensors package."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def read_files(folder: Path) -> dict[str, bytes]:
    """The content of every file of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip_last_bit(path: Path) -> None:
    """Flip the last bit of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def copy_golden(name: str, destination: Path) -> Path:
    """Copy a golden checkpoint and return the copy."""
    shutil.copytree(GOLDEN / name, destination)
    return destination


def rewrite_shard(path: Path, changes: Mapping[str, np.ndarray | None]) -> None:
    """Replace, add or (None) remove tensors of a file; an index file does not change."""
    tensors = {**load_file(path), **changes}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)


def shard_with(folder: Path, key: str) -> Path:
    """The file that contains a tensor."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][key]


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether dtype, shape and bytes are equal."""
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.tobytes() == right.tobytes()
    )
