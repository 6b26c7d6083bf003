"""Reading parameters from a checkpoint folder onto a mesh, and writing them back."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from ovis_jax.api_type_checks import check_argument_types
from ovis_jax.checkpoint.checkpoint_problems import CheckpointProblem
from ovis_jax.checkpoint.conversion_record import (
    CONVERSION_FILE,
    is_converted,
    make_conversion_record,
    set_config_dtype,
)
from ovis_jax.checkpoint.file_io import add_file_name_to_os_errors, write_json
from ovis_jax.checkpoint.key_map import (
    MatchedTensors,
    make_converted_key_map,
    make_hub_key_map,
    match_tensors,
)
from ovis_jax.checkpoint.output_dirs import atomic_dir, check_disk_space
from ovis_jax.checkpoint.safetensors_reader import DTYPES, TensorInfo, map_file, view_tensor
from ovis_jax.checkpoint.safetensors_writer import (
    MAX_SHARD_BYTES,
    cast_array,
    plan_shards,
    split_array,
    total_bytes,
    write_shards,
)
from ovis_jax.checkpoint.tensor_index import (
    HeaderReader,
    TensorIndex,
    read_local_header,
    read_tensor_index,
)
from ovis_jax.config import OvisConfig
from ovis_jax.errors import ConfigError, OvisError
from ovis_jax.json_fields import read_json
from ovis_jax.model.ovis import Params
from ovis_jax.sharding import (
    TENSOR,
    Rules,
    param_axes,
    param_shapes,
    param_shardings,
    unpadded_rows,
)

OnRead = Callable[[str, int], None]
"""Called with a tensor's key and the bytes of each slice of it that this process reads."""


def match_checkpoint(
    folder: Path,
    config: OvisConfig,
    dtype: DTypeLike | None = None,
    read_header: HeaderReader = read_local_header,
) -> tuple[MatchedTensors, str]:
    """Match the tensors of a folder in either layout with the parameters of a config.

    Args:
      folder: a converted folder, or one in the Hub's layout.
      config: config whose parameters are expected.
      dtype: dtype to cast to, from any of the three; None for the one that config.json states,
        which every parameter must then have.
      read_header: as in `read_tensor_index`.

    Returns:
      The matched tensors, and the dtype of the parameters: "F32", "F16" or "BF16".

    Raises:
      ConfigError: config.json states no dtype that parameters can have, and none is given.
      CheckpointError: the folder does not contain exactly the parameters of `config`.
    """
    stored = None if dtype is not None else read_config_dtype(folder)
    make_key_map = make_converted_key_map if is_converted(folder) else make_hub_key_map
    index = read_tensor_index(folder, read_header)
    matched = match_tensors(index, config, make_key_map(config), stored)
    return matched, stored or safetensors_dtype(dtype)


def read_config_dtype(folder: Path) -> str:
    """Read the dtype that config.json states: "F32", "F16" or "BF16".

    Raises:
      ConfigError: it states none, or one that parameters cannot have.
    """
    path = folder / "config.json"
    name = read_json(path).get("torch_dtype")
    if not isinstance(name, str):
        raise ConfigError(
            f"{path}: torch_dtype is {name!r}, expected a dtype; give the dtype to cast to"
        )
    try:
        return safetensors_dtype(name)
    except OvisError as error:
        raise ConfigError(f"{path}: torch_dtype: {error}") from error


def safetensors_dtype(dtype: DTypeLike | None) -> str:
    """Return the safetensors name of a dtype: "F32", "F16" or "BF16".

    Raises:
      OvisError: it is not float32, float16 or bfloat16.
    """
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    for name, known in DTYPES.items():
        if dtype is not None and found == known:
            return name
    raise OvisError(f"dtype {dtype!r}: expected float32, float16 or bfloat16")


def load_params(
    folder: Path,
    config: OvisConfig,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: Rules = TENSOR,
    on_read: OnRead | None = None,
) -> Params:
    """Read the parameters of a converted folder, or of one in the Hub's layout.

    A CPU device without a mesh uses the mapped files without a copy (a donated array is copied
    first), so replace such files by renaming and do not write to them.

    Args:
      folder: the checkpoint.
      config: its config.
      dtype: float32, float16 or bfloat16 to cast to; None keeps the stored dtype.
      mesh: mesh whose devices each read their own slices only; None for the default device.
      rules: sharding rules for the mesh.
      on_read: called for each slice that is read, once if several devices hold the same one.

    Returns:
      A nested dict of arrays in the shapes of `param_shapes`, with zeros where the shapes of the
      mesh are padded.

    Raises:
      ConfigError: config.json states no usable dtype and none is given.
      CheckpointError: the files do not contain exactly the parameters of `config`.
      OvisError: the rules cannot shard the parameters over the mesh.
      OSError: a file cannot be read.
    """
    matched, target = match_checkpoint(folder, config, dtype)
    shardings = None if mesh is None else param_shardings(config, mesh, rules)
    shapes = param_shapes(config, mesh, rules)
    mapped = {path: map_file(path) for path in {info.path for info in matched.sources.values()}}

    def load(path: str, info: TensorInfo) -> jax.Array:
        view = view_tensor(mapped[info.path], info)
        sharding = None if shardings is None else shardings[path]
        on_slice = None if on_read is None else partial(on_read, info.key)
        return put_on_devices(info.key, view, target, sharding, shapes[path], on_slice)

    flat = {path: load(path, info) for path, info in matched.sources.items()}
    return unflatten_dict(flat, sep="/")


def put_on_devices(
    key: str,
    array: np.ndarray,
    dtype: str,
    sharding: NamedSharding | None,
    shape: tuple[int, ...],
    on_slice: Callable[[int], None] | None = None,
) -> jax.Array:
    """Cast an array and put it on the default device, or its slices on the devices of a sharding.

    Args:
      key: name of the tensor, for errors.
      array: host array of any shape.
      dtype: "F32", "F16" or "BF16".
      sharding: sharding of the result; None for the default device.
      shape: shape of the result with a sharding; the rest of it is filled with zeros.
      on_slice: called with the bytes of each slice of `array` that is used.

    Raises:
      CheckpointError: a number is too large for the dtype.
    """
    slices: set[str] = set()

    def cast_slice(index: tuple[slice, ...] | None) -> np.ndarray:
        part = array if index is None else array[index]
        if on_slice is not None and str(index) not in slices:
            slices.add(str(index))
            on_slice(part.nbytes)
        return cast_array(key, part, dtype)

    if sharding is None:
        return jax.device_put(cast_slice(None))

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        part = cast_slice(index)
        local = sharding.shard_shape(shape)
        pads = [(0, size - used) for size, used in zip(local, part.shape, strict=True)]
        return np.pad(part, pads) if part.shape != local else part

    return jax.make_array_from_callback(shape, sharding, read)


def save_params(
    folder: str | Path,
    params: Mapping[str, Any],
    config: OvisConfig,
    *,
    dtype: DTypeLike | None = None,
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write parameters as a converted folder, which appears when it is complete.

    The padding that parameters have on a mesh is not written.

    Args:
      folder: folder to create; it must not exist or be empty.
      params: nested dict of arrays, all of one dtype unless `dtype` is given.
      config: config of the parameters.
      dtype: float32, float16 or bfloat16 to cast to.
      files: further files by name, such as those of the tokenizer.
      max_shard_bytes: limit for the tensors of a file.

    Raises:
      CheckpointError: `params` are not those of `config`, or have several dtypes.
      OvisError: the folder is not empty, or an array is not entirely on the devices of this host.
      OSError: the disk has too little space, or a file cannot be written.
      TypeError: `params` or `config` has another type.
    """
    check_argument_types("save_params", params=(params, Mapping), config=(config, OvisConfig))
    folder = Path(folder)
    arrays = remove_padding(flatten_dict(params, sep="/"), param_axes(config), config)
    index = index_arrays("params", arrays)
    known = (info.dtype for info in index.tensors if info.dtype in DTYPES)
    stored = None if dtype is not None else next(known, None)
    match_tensors(index, config, make_converted_key_map(config), stored)
    target = stored or safetensors_dtype(dtype)
    tensors = {path: (target, shape) for path, shape in param_shapes(config).items()}

    def read_tensor(path: str) -> Iterator[memoryview]:
        return split_array(cast_array(path, np.asarray(arrays[path]), target))

    check_disk_space(folder, total_bytes(tensors))
    with atomic_dir(folder) as partial:
        shards = plan_shards(tensors, max_shard_bytes)
        sha256 = write_shards(partial, tensors, read_tensor, shards)
        config_json, generation_json = config.to_hf()
        write_json(partial / "config.json", set_config_dtype(config_json, target))
        write_json(partial / "generation_config.json", generation_json)
        for name, content in (files or {}).items():
            with add_file_name_to_os_errors(partial / name):
                (partial / name).write_bytes(content)
        write_json(partial / CONVERSION_FILE, make_conversion_record(tensors, sha256))


def remove_padding(
    arrays: Mapping[str, Any], axes: Mapping[str, str], config: OvisConfig
) -> dict[str, Any]:
    """Remove the rows of zeros that pad arrays on a mesh beyond the sizes in the config.

    Rows that are not zero are not padding. They stay, and the shape check then reports them.

    Args:
      arrays: arrays by path.
      axes: axis letters by path.
      config: config of the arrays.
    """
    result = dict(arrays)
    for path, array in arrays.items():
        rows = unpadded_rows(config, axes[path]) if path in axes else None
        if rows is None or not isinstance(array, jax.Array | np.ndarray):
            continue
        local = isinstance(array, np.ndarray) or array.is_fully_addressable
        if local and array.ndim and array.shape[0] > rows:
            padded = np.asarray(array)
            result[path] = array if np.any(padded[rows:]) else padded[:rows]
    return result


def index_arrays(name: str, arrays: Mapping[str, Any]) -> TensorIndex:
    """Return the index of arrays in memory, so that they are checked like those of a folder.

    Args:
      name: what messages call the arrays.
      arrays: arrays by key; other values become problems.

    Raises:
      OvisError: an array is not entirely on the devices of this host.
    """
    dtype_names = {dtype: dtype_name for dtype_name, dtype in DTYPES.items()}
    infos, problems = [], []
    for key, array in arrays.items():
        if not isinstance(array, jax.Array | np.ndarray):
            found = type(array).__name__
            problems.append(CheckpointProblem(name, key, "not an array", "an array", found))
        elif isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise OvisError(f"{key}: parts are on devices of other hosts; gather it to save it")
        else:
            dtype = dtype_names.get(array.dtype, str(array.dtype))
            infos.append(TensorInfo(Path(name), key, dtype, array.shape, 0, array.nbytes))
    unusable = frozenset(row.key for row in problems)
    return TensorIndex(Path(name), tuple(infos), {}, unusable, tuple(problems))
