"""The input files of a conversion: identifying them, detecting changes, and copying small files."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ovis_jax.checkpoint.checkpoint_problems import escape_unprintable
from ovis_jax.checkpoint.conversion_record import get_library_versions, set_config_dtype
from ovis_jax.checkpoint.file_io import write_json
from ovis_jax.checkpoint.safetensors_reader import TensorInfo
from ovis_jax.checkpoint.safetensors_writer import TensorSpecs
from ovis_jax.errors import CheckpointError
from ovis_jax.json_fields import read_json


def describe_inputs(
    sources: Mapping[str, TensorInfo],
    tensors: TensorSpecs,
    *options: Any,
    origin: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Describe everything that a result depends on, so that only the same conversion is resumed.

    Args:
      sources: Tensors that are read, by name in the result.
      tensors: Dtypes and shapes of the result.
      *options: Additional options, as JSON.
      origin: Identification of the source if its files may be remote. If None, the files are
        identified by their sizes and modification times.

    Raises:
      OSError: A file does not exist.
    """
    layout = [(name, str(x.path), x.dtype, x.start, x.stop) for name, x in sources.items()]
    digest = hashlib.sha256(json.dumps([layout, [*tensors.items()], options]).encode())
    if origin is None:
        origin = {"sources": read_file_stats(info.path for info in sources.values())}
    versions = get_library_versions()
    return {**origin, "tensors and options": digest.hexdigest(), "versions": versions}


def read_file_stats(paths: Iterable[Path]) -> dict[str, list[int]]:
    """Return [size in bytes, modification time in nanoseconds] of files, by path.

    Raises:
      OSError: A file does not exist.
    """
    stats = {str(path): path.stat() for path in set(paths)}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in sorted(stats.items())}


def check_unchanged(file_stats: Mapping[str, list[int]]) -> None:
    """Check that files have not changed since `read_file_stats`.

    Raises:
      CheckpointError: A file has changed.
      OSError: A file no longer exists.
    """
    for path, found in read_file_stats(map(Path, file_stats)).items():
        if found != file_stats[path]:
            raise CheckpointError(
                f"{escape_unprintable(path)} has changed while it was read; make sure that nothing"
                " writes to it and start again"
            )


def copy_small_files(
    source: Path, destination: Path, names: Iterable[str], dtype: str | None
) -> None:
    """Copy config.json, generation_config.json and other files of a checkpoint.

    Args:
      source: Folder of the checkpoint.
      destination: Existing folder.
      names: Names of the other files to copy.
      dtype: Dtype to state in the copied config.json: "F32", "F16" or "BF16"; None for no change.

    Raises:
      OSError: A file cannot be read or written.
    """
    for name in ("config.json", "generation_config.json", *names):
        shutil.copyfile(source / name, destination / name)
    if dtype is not None:
        config_json = read_json(source / "config.json")
        write_json(destination / "config.json", set_config_dtype(config_json, dtype))
