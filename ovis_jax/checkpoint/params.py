"""Loading parameters from a checkpoint folder onto a mesh, and saving them."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from ovis_jax.argument_type_checks import check_argument_types
from ovis_jax.checkpoint.checkpoint_problems import CheckpointProblem, CheckpointValidationError
from ovis_jax.checkpoint.conversion_record import (
    CONVERSION_FILE,
    DTYPE_FIELDS,
    is_converted,
    make_conversion_record,
    read_quantization,
    set_config_dtype,
)
from ovis_jax.checkpoint.file_io import add_file_name_to_os_errors, write_json
from ovis_jax.checkpoint.gptq import (
    check_gptq_constants,
    gptq_constants,
    gptq_weights_file,
    make_gptq_key_map,
    read_gptq_quantization,
    repack_gptq,
)
from ovis_jax.checkpoint.key_map import (
    EMBEDDING_KEY,
    MatchedTensors,
    make_converted_key_map,
    make_hub_key_map,
    match_tensors,
)
from ovis_jax.checkpoint.output_dirs import atomic_dir, check_disk_space
from ovis_jax.checkpoint.safetensors_reader import (
    DTYPES,
    INTEGER_DTYPES,
    TensorInfo,
    map_file,
    view_tensor,
)
from ovis_jax.checkpoint.safetensors_writer import (
    MAX_SHARD_BYTES,
    cast_array,
    order_in_file,
    plan_shards,
    split_array,
    total_bytes,
    write_shards,
)
from ovis_jax.checkpoint.tensor_index import (
    DOWNLOAD_ADVICE,
    SINGLE_FILE,
    HeaderReader,
    TensorIndex,
    read_header_if_present,
    read_tensor_index,
)
from ovis_jax.config import OvisConfig
from ovis_jax.errors import CheckpointError, ConfigError, OvisError
from ovis_jax.global_arrays import gather_array, is_global
from ovis_jax.json_fields import read_json
from ovis_jax.model.linear import Quantized
from ovis_jax.model.ovis import Params
from ovis_jax.quantization import (
    Quantization,
    choose_quantization,
    find_undivided,
    pack_int4,
    quantize_rows,
    quantized_matrices,
    quantized_shardings,
    scale_path,
    stored_specs,
    stored_tensors,
    unpack_int4,
)
from ovis_jax.sharding import (
    TENSOR,
    Rules,
    param_shapes,
    param_shardings,
    unpadded_rows,
)

_ROWS_PER_COMPARISON = 4096
_ROWS_PER_BLOCK = 1024

OnRead = Callable[[str, int], None]
"""A function that is called with a tensor's key and a size in bytes for each slice that is read."""


def match_checkpoint(
    folder: Path,
    config: OvisConfig,
    dtype: DTypeLike | None = None,
    read_header: HeaderReader = read_header_if_present,
) -> tuple[MatchedTensors, str]:
    """Match the tensors of a converted folder or a Hub folder with the parameters of a config.

    Args:
      folder: A converted folder, or a folder in the Hub's layout.
      config: Config that determines the expected parameters.
      dtype: Dtype that parameters will be cast to, whatever their stored dtype; None for the dtype
        in config.json, which must then be the stored dtype of every parameter. If GPTQ quantized
        the folder, None stands for the dtype of the text embedding.
      read_header: Function that reads a header, as in `read_tensor_index`.

    Returns:
      The matched tensors, and the dtype of the parameters: "F32", "F16" or "BF16".

    Raises:
      ConfigError: `dtype` is None, and config.json does not state a supported dtype.
      CheckpointError: The folder does not contain exactly the parameters of `config`, its output
        matrix differs from the embedding although config.json ties the two, or its quantization is
        not supported.
    """
    quantization = read_stored_quantization(folder)
    if quantization is not None and (undivided := find_undivided(config, quantization)):
        path, inputs = undivided[0]
        raise CheckpointError(
            f"{folder}: the groups of {quantization.group_size} inputs do not divide the {inputs}"
            f" inputs of {path}; {DOWNLOAD_ADVICE}"
        )
    weights_file = SINGLE_FILE
    if is_converted(folder):
        key_map = make_converted_key_map(config, quantization)
    elif quantization is None:
        key_map = make_hub_key_map(config)
    else:
        key_map = make_gptq_key_map(config, quantization)
        weights_file = gptq_weights_file(quantization)
    stored = None if dtype is not None else read_stored_dtype(folder, read_header)
    index = read_tensor_index(folder, read_header, weights_file)
    matched = match_tensors(index, config, key_map, stored)
    if all(path.is_file() for path in files_with_checked_values(matched)):
        check_values(matched)
    return matched, stored or safetensors_dtype(dtype)


def read_stored_quantization(folder: Path) -> Quantization | None:
    """Read how the matrices in a folder are quantized; None if they are not.

    Args:
      folder: A converted folder, or a folder in the Hub's layout, which GPTQ may have quantized.

    Raises:
      CheckpointError: The quantization is not known.
      ConfigError: A setting of GPTQ is not supported, or a file cannot be read.
    """
    return read_quantization(folder) if is_converted(folder) else read_gptq_quantization(folder)


def read_stored_dtype(folder: Path, read_header: HeaderReader = read_header_if_present) -> str:
    """Read the dtype of the tensors that are not quantized: "F32", "F16" or "BF16".

    The dtype is read from config.json. If GPTQ quantized the folder, config.json may still state
    the dtype from before the quantization, so the dtype of the text embedding is returned instead.

    Raises:
      ConfigError: The dtype is not supported, or a setting of GPTQ is not supported.
      CheckpointError: The quantization is not known.
      OSError: A file cannot be read.
    """
    quantization = read_stored_quantization(folder)
    if quantization is not None and not is_converted(folder):
        header = read_header(folder / gptq_weights_file(quantization))
        dtypes = {} if header is None else {info.key: info.dtype for info in header.tensors}
        if (found := dtypes.get(EMBEDDING_KEY)) in DTYPES:
            return str(found)
    return read_config_dtype(folder)


def resolve_quantization(
    folder: Path, config: OvisConfig, quantization: str | None
) -> tuple[Quantization | None, Quantization | None]:
    """Return the stored quantization of a folder's matrices, and their quantization after reading.

    Args:
      folder: A converted folder or a folder in the Hub's layout.
      config: The checkpoint's config.
      quantization: "int8" or "int4" to quantize while reading; None to keep what is stored.

    Raises:
      CheckpointError, ConfigError: As in `read_stored_quantization`.
      OvisError: The quantization is unknown or does not fit the config, or the stored matrices are
        already quantized differently.
    """
    stored = read_stored_quantization(folder)
    wanted = stored if quantization is None else choose_quantization(config, quantization)
    if stored is not None and wanted != stored:
        raise OvisError(
            f"quantization {quantization!r}: the matrices in {folder} are already {stored}; leave"
            " quantization out, or give a checkpoint that is not quantized"
        )
    return stored, wanted


def files_with_checked_values(matched: MatchedTensors) -> list[Path]:
    """Return the files that contain the tensors that `check_values` reads."""
    infos = [*(matched.tied_output or ()), *(info for info, _, _ in gptq_constants(matched))]
    return sorted({info.path for info in infos})


def check_values(matched: MatchedTensors) -> None:
    """Check the tensors whose numbers are known: a copy of a tied embedding, and GPTQ's constants.

    Raises:
      CheckpointValidationError: A number differs from its known value.
      CheckpointError: A file has become shorter since its header was read.
      OSError: A file cannot be read.
    """
    if matched.tied_output:
        check_tied_output(*matched.tied_output)
    check_gptq_constants(matched)


def check_tied_output(output: TensorInfo, embedding: TensorInfo) -> None:
    """Check that an output matrix equals the embedding that config.json ties it to.

    Raises:
      CheckpointValidationError: A row differs.
      CheckpointError: A file has become shorter since its header was read.
      OSError: A file cannot be read.
    """
    rows = [view_tensor(map_file(info.path), info) for info in (output, embedding)]
    for start in range(0, len(rows[0]), _ROWS_PER_COMPARISON):
        block = slice(start, start + _ROWS_PER_COMPARISON)
        differs = np.any(rows[0][block] != rows[1][block], axis=1)
        if differs.any():
            row = CheckpointProblem(
                output.path.name,
                output.key,
                "differs from the tied embedding",
                f"a copy of {embedding.key}, because config.json ties the two",
                f"other numbers in row {start + int(differs.argmax())}",
            )
            advice = "set disable_tie_weight to true in config.json, or remove the tensor"
            raise CheckpointValidationError(str(output.path.parent), [row], advice)


def read_config_dtype(folder: Path) -> str:
    """Read the dtype in config.json: "F32", "F16" or "BF16".

    Raises:
      ConfigError: The file config.json does not state a supported dtype.
    """
    path = folder / "config.json"
    config = read_json(path)
    stated = {key: config[key] for key in DTYPE_FIELDS if config.get(key) is not None}
    (field, name), *others = (stated or dict.fromkeys(DTYPE_FIELDS[:1])).items()
    if not isinstance(name, str) or any(other != name for _, other in others):
        found = " and ".join(f"{key} is {value!r}" for key, value in [(field, name), *others])
        raise ConfigError(f"{path}: {found}, expected a dtype; give the dtype to cast to")
    try:
        return safetensors_dtype(name)
    except OvisError as error:
        raise ConfigError(f"{path}: {field}: {error}") from error


def safetensors_dtype(dtype: DTypeLike | None) -> str:
    """Return the safetensors name of a dtype: "F32", "F16" or "BF16".

    Raises:
      OvisError: The dtype is not float32, float16 or bfloat16.
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
    quantization: str | None = None,
    on_read: OnRead | None = None,
) -> Params:
    """Read the parameters from a converted folder or a folder in the Hub's layout.

    On a CPU without a mesh, the arrays use the memory-mapped files without a copy (a donated array
    is copied first). Do not write to these files afterwards; replace a file by renaming a new one.

    Args:
      folder: The checkpoint.
      config: The checkpoint's config.
      dtype: Dtype to cast to: float32, float16 or bfloat16; None keeps the stored dtype.
      mesh: Mesh to shard the parameters over; each device reads only its own slices. None for the
        default device.
      rules: Sharding rules for the mesh.
      quantization: "int8" or "int4" to quantize the matrices while reading, one matrix at a time.
        None loads them as they are stored; stored quantized matrices stay quantized.
      on_read: Called once for each slice that is read, even if several devices hold the same slice.

    Returns:
      A nested dict whose leaves are arrays with the shapes from `param_shapes`, or `Quantized`
      matrices. If a shape is padded for the mesh, the padding consists of zeros.

    Raises:
      ConfigError: `dtype` is None, and config.json does not state a supported dtype.
      CheckpointError: The files do not contain exactly the parameters of `config`.
      OvisError: The rules cannot shard the parameters over the mesh, the quantization is unknown
        or does not fit the config, or the checkpoint is quantized differently.
      OSError: A file cannot be read.
    """
    stored, wanted = resolve_quantization(folder, config, quantization)
    is_gptq = stored is not None and not is_converted(folder)
    matched, target = match_checkpoint(folder, config, dtype)
    shardings = None if mesh is None else param_shardings(config, mesh, rules)
    shapes = param_shapes(config, mesh, rules)
    mapped = {path: map_file(path) for path in {info.path for info in matched.sources.values()}}
    matrices = quantized_matrices(config, wanted)

    def view(path: str) -> np.ndarray:
        info = matched.sources[path]
        return view_tensor(mapped[info.path], info)

    def callback(path: str) -> Callable[[int], None] | None:
        return None if on_read is None else partial(on_read, matched.sources[path].key)

    def load(path: str) -> Any:
        sharding, shape = None if shardings is None else shardings[path], shapes[path]
        if wanted is None or path not in matrices:
            key = matched.sources[path].key
            return put_on_devices(key, view(path), target, sharding, shape, callback(path))
        group = wanted.group_of(path)
        if stored is None:
            q, scale = quantize_matrix(view(path), group)
        else:
            q, scale = view(path), view(scale_path(path)).astype(np.float32, copy=False)
            if group is not None:
                q = unpack_int4(repack_gptq(q) if is_gptq else q, group)
        on_slices = callback(path), callback(path if stored is None else scale_path(path))
        return _put_quantized_on_devices(path, q, scale, sharding, shape, on_slices)

    return unflatten_dict({path: load(path) for path in shapes}, sep="/")


def quantize_matrix(matrix: np.ndarray, group: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix with `quantize_rows`, in blocks of rows that several threads process."""
    starts = range(0, len(matrix), _ROWS_PER_BLOCK)
    with ThreadPoolExecutor() as threads:
        blocks = [matrix[start : start + _ROWS_PER_BLOCK] for start in starts]
        parts = [*threads.map(partial(quantize_rows, group=group), blocks)]
    q, scale = zip(*parts, strict=True)
    return np.concatenate(q, axis=-2), np.concatenate(scale, axis=-1)


def _put_quantized_on_devices(
    path: str,
    q: np.ndarray,
    scale: np.ndarray,
    sharding: NamedSharding | None,
    shape: tuple[int, ...],
    on_slices: tuple[Callable[[int], None] | None, Callable[[int], None] | None],
) -> Quantized:
    """Put a quantized matrix on devices, with the sharding and the padded shape of the matrix."""
    rows = shape[0]
    q_shape, scale_shape = (*q.shape[:-2], rows, q.shape[-1]), (*scale.shape[:-1], rows)
    q_sharding = scale_sharding = None
    if sharding is not None:
        num_groups = len(q) if q.ndim == 3 else None
        q_sharding, scale_sharding = quantized_shardings(path, sharding, num_groups)
    return Quantized(
        put_on_devices(path, q, None, q_sharding, q_shape, on_slices[0]),
        put_on_devices(scale_path(path), scale, None, scale_sharding, scale_shape, on_slices[1]),
    )


def put_on_devices(
    key: str,
    array: np.ndarray,
    dtype: str | None,
    sharding: NamedSharding | None,
    shape: tuple[int, ...],
    on_slice: Callable[[int], None] | None = None,
) -> jax.Array:
    """Cast an array and put it on the default device, or shard it over several devices.

    Args:
      key: Name of the tensor in error messages.
      array: Host array of any shape.
      dtype: "F32", "F16" or "BF16"; None for no cast.
      sharding: Sharding of the result; None for the default device.
      shape: Shape of the result if there is a sharding; the part beyond `array` is filled with
        zeros.
      on_slice: Called once with the size in bytes of each slice of `array` that devices receive.

    Raises:
      CheckpointError: A number is too large for the dtype.
    """
    slices: set[str] = set()

    def cast_slice(index: tuple[slice, ...] | None) -> np.ndarray:
        part = array if index is None else array[index]
        if on_slice is not None and str(index) not in slices:
            slices.add(str(index))
            on_slice(part.nbytes)
        return part if dtype is None else cast_array(key, part, dtype)

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
    """Write parameters to a converted folder, which appears only when it is complete.

    Padding that was added for a mesh is not written. If arrays are on the devices of several
    processes, all processes must call this function: they gather one array at a time, and process 0
    writes.

    Args:
      folder: Folder to create; it must either not exist or be empty.
      params: Nested dict of arrays, all of one dtype unless `dtype` is given, and of `Quantized`
        matrices.
      config: Config of the model.
      dtype: Dtype to cast the arrays to: float32, float16 or bfloat16; None for no cast.
        `Quantized` matrices stay as they are.
      files: Content of additional files by file name, such as tokenizer files.
      max_shard_bytes: Maximum size of the tensors in one file, in bytes.

    Raises:
      CheckpointError: The parameters do not match `config`, or they have several dtypes.
      OvisError: The folder is not empty.
      OSError: The disk has too little space, or a file cannot be written.
      TypeError: `params` or `config` has the wrong type.
    """
    check_argument_types("save_params", params=(params, Mapping), config=(config, OvisConfig))
    folder, flat = Path(folder), flatten_dict(params, sep="/")
    quantization = find_quantization(flat)
    arrays: dict[str, Any] = {}
    for path, x in flat.items():
        arrays |= {path: x.q, scale_path(path): x.scale} if isinstance(x, Quantized) else {path: x}
    key_map = make_converted_key_map(config, quantization)
    own_tensors = stored_tensors(config, quantization)
    axes = {name: letters for name, (letters, _) in own_tensors.items()}
    arrays = remove_padding(arrays, axes, config)
    index = index_arrays("params", arrays)
    known = (
        info.dtype
        for info in index.tensors
        if info.dtype in DTYPES and own_tensors.get(info.key, ("", None))[1] is None
    )
    stored = None if dtype is not None else next(known, None)
    match_tensors(index, config, key_map, stored)
    target = stored or safetensors_dtype(dtype)
    tensors = stored_specs(config, quantization, target)

    def read_tensor(name: str) -> Iterator[memoryview]:
        array, own_dtype = gather_array(arrays[name]), own_tensors[name][1]
        if own_dtype is None:
            array = cast_array(name, array, target)
        return split_array(pack_int4(array) if own_dtype == "U8" else array)

    shards = plan_shards(tensors, max_shard_bytes)
    if jax.process_index() > 0 and any(map(is_global, arrays.values())):
        for names in shards.values():
            for name in order_in_file({name: tensors[name] for name in names}):
                gather_array(arrays[name])
        return
    check_disk_space(folder, total_bytes(tensors))
    with atomic_dir(folder) as partial:
        sha256 = write_shards(partial, tensors, read_tensor, shards)
        config_json, generation_json = config.to_hf()
        write_json(partial / "config.json", set_config_dtype(config_json, target))
        write_json(partial / "generation_config.json", generation_json)
        for name, content in (files or {}).items():
            with add_file_name_to_os_errors(partial / name):
                (partial / name).write_bytes(content)
        record = make_conversion_record(config, tensors, sha256, target, quantization)
        write_json(partial / CONVERSION_FILE, record)


def find_quantization(params: Mapping[str, Any]) -> Quantization | None:
    """Return the quantization of parameters by path; None if no matrix is quantized."""
    matrices = {path: x for path, x in params.items() if isinstance(x, Quantized)}
    groups = (x.q.shape[-1] for x in matrices.values() if x.q.ndim == 3)
    if (group_size := next(groups, None)) is not None:
        decoder_only = all(x.q.ndim == 3 for x in matrices.values())
        return Quantization("int4", group_size, decoder_only)
    return Quantization("int8") if matrices else None


def remove_padding(
    arrays: Mapping[str, Any], axes: Mapping[str, str], config: OvisConfig
) -> dict[str, Any]:
    """Remove the rows of zeros that were added to arrays as padding for a mesh.

    Excess rows that are not zero cannot be padding. They are kept, so a later shape check reports
    them.

    Args:
      arrays: Arrays by path.
      axes: Axis letters by path.
      config: Config of the model.
    """
    result = dict(arrays)
    for path, array in arrays.items():
        rows = unpadded_rows(config, axes[path]) if path in axes else None
        if rows is None or not isinstance(array, jax.Array | np.ndarray):
            continue
        if array.ndim and array.shape[0] > rows:
            padded = array if is_global(array) else np.asarray(array)
            result[path] = array if np.any(gather_array(padded[rows:])) else padded[:rows]
    return result


def index_arrays(name: str, arrays: Mapping[str, Any]) -> TensorIndex:
    """Return a tensor index of arrays in memory, so that they can be checked like files.

    An int4 array is indexed with the dtype and the shape that it has in files.

    Args:
      name: Name of the arrays in messages.
      arrays: Arrays by key; a value that is not an array becomes a problem in the index.
    """
    known = {**DTYPES, **INTEGER_DTYPES}
    dtype_names = {dtype: dtype_name for dtype_name, dtype in known.items()}
    infos, problems = [], []
    for key, array in arrays.items():
        if not isinstance(array, jax.Array | np.ndarray):
            found = type(array).__name__
            problems.append(CheckpointProblem(name, key, "not an array", "an array", found))
        else:
            dtype, shape = dtype_names.get(array.dtype, str(array.dtype)), array.shape
            if array.dtype == ml_dtypes.int4 and array.ndim == 3:
                groups, rows, group = shape
                dtype, shape = "U8", (rows, groups * group // 2)
            infos.append(TensorInfo(Path(name), key, dtype, shape, 0, array.nbytes))
    unusable = frozenset(row.key for row in problems)
    return TensorIndex(Path(name), tuple(infos), {}, unusable, tuple(problems))
