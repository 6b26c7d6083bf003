"""Parameters from a folder, straight onto a mesh, and back into one."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from ovis_jax.checkpoint.folder import CheckpointFolder, ReadHeader, header_there, open_checkpoint
from ovis_jax.checkpoint.keymap import Plan, account, hub_keys, own_keys
from ovis_jax.checkpoint.problems import Problem, naming_file
from ovis_jax.checkpoint.safetensors_files import DTYPES, TensorEntry, map_file, view_tensor
from ovis_jax.checkpoint.writer import (
    CONVERSION_FILE,
    FORMAT,
    MAX_SHARD_BYTES,
    array_pieces,
    cast,
    check_space,
    conversion_record,
    tensor_bytes,
    whole_or_absent,
    with_dtype,
    write_json,
    write_tensors,
)
from ovis_jax.config import OvisConfig
from ovis_jax.errors import CheckpointError, ConfigError, OvisError
from ovis_jax.fields import read_json
from ovis_jax.sharding import (
    TENSOR,
    Rules,
    param_axes,
    param_shapes,
    param_shardings,
    true_rows,
)

Params = dict[str, Any]

OnRead = Callable[[str, int], None]
"""Called with a tensor's key and the bytes of each slice of it that this process reads."""


def plan_parameters(
    folder: Path,
    config: OvisConfig,
    dtype: DTypeLike | None = None,
    read: ReadHeader = header_there,
) -> tuple[Plan, str]:
    """Where each parameter stands in a folder of either layout, and the dtype it is to have.

    That dtype ("F32", "F16", "BF16") is `dtype`, to which any of the three is then cast, or the one
    that config.json states, which every parameter must then have. `read` is as in
    `open_checkpoint`.

    Raises:
      ConfigError: config.json states no dtype that parameters may have, and none was given.
      CheckpointError: the folder's files do not hold exactly the parameters of `config`.
    """
    stored = None if dtype is not None else declared_dtype(folder)
    keys = own_keys(config) if is_converted(folder) else hub_keys(config)
    plan = account(open_checkpoint(folder, read), config, keys, stored)
    return plan, stored or dtype_name(dtype)


def is_converted(folder: Path) -> bool:
    """Whether a folder was written by this library, so that its tensors have our names.

    Raises:
      CheckpointError: it was, in a format of another version.
      ConfigError: conversion.json cannot be read.
    """
    path = folder / CONVERSION_FILE
    if not path.exists():
        return False
    found = read_json(path).get("format")
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: format is {found!r}, expected {FORMAT}; convert the checkpoint again with"
            " this version of ovis_jax"
        )
    return True


def declared_dtype(folder: Path) -> str:
    """The dtype that config.json states: "F32", "F16" or "BF16".

    Raises:
      ConfigError: it states none, or one that parameters may not have.
    """
    path = folder / "config.json"
    name = read_json(path).get("torch_dtype")
    if not isinstance(name, str):
        raise ConfigError(f"{path}: torch_dtype is {name!r}, expected a dtype; name one to cast to")
    try:
        return dtype_name(name)
    except OvisError as error:
        raise ConfigError(f"{path}: torch_dtype: {error}") from error


def dtype_name(dtype: DTypeLike | None) -> str:
    """The safetensors name of a dtype given in any of the ways of jax.

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
    """Read the parameters of a converted folder or of one in the Hub's layout.

    Returns a nested dict of arrays in the shapes of `param_shapes`, of the stored dtype or `dtype`.
    With a mesh each device reads only its own slice of the mapped files, and has zeros where the
    mesh's shapes go beyond them. Without one the arrays are on the default device; a CPU device
    uses the mapped files where they are (a donated array is copied first), so replace such files by
    renaming and do not write into them. `on_read` is told of every slice, once where several
    devices hold the same.

    Raises:
      ConfigError: config.json states no usable dtype and none is given.
      CheckpointError: the files do not hold exactly the parameters of `config`.
      OvisError: the parameters cannot be laid on the mesh by the rules.
      OSError: a file cannot be read.
    """
    plan, target = plan_parameters(folder, config, dtype)
    shardings = None if mesh is None else param_shardings(config, mesh, rules)
    shapes = param_shapes(config, mesh, rules)
    mapped = {path: map_file(path) for path in {entry.path for entry in plan.sources.values()}}

    def load(path: str, entry: TensorEntry) -> jax.Array:
        view = view_tensor(mapped[entry.path], entry)
        sharding = None if shardings is None else shardings[path]
        told = None if on_read is None else partial(on_read, entry.key)
        return place(entry.key, view, target, sharding, shapes[path], told)

    flat = {path: load(path, entry) for path, entry in plan.sources.items()}
    return unflatten_dict(flat, sep="/")


def place(
    key: str,
    array: np.ndarray,
    dtype: str,
    sharding: NamedSharding | None,
    shape: tuple[int, ...],
    on_read: Callable[[int], None] | None = None,
) -> jax.Array:
    """An array in a dtype on the default device, or each device's slice of it alone.

    With a sharding it gets `shape`, with zeros behind what the array has. `on_read` is called with
    the bytes of each slice of `array` that is used.

    Raises:
      CheckpointError: a number is too large for the dtype.
    """
    slices: set[str] = set()

    def use(index: tuple[slice, ...] | None) -> np.ndarray:
        part = array if index is None else array[index]
        if on_read is not None and str(index) not in slices:
            slices.add(str(index))
            on_read(part.nbytes)
        return cast(key, part, dtype)

    if sharding is None:
        return jax.device_put(use(None))

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        part = use(index)
        local = sharding.shard_shape(shape)
        pads = [(0, size - there) for size, there in zip(local, part.shape, strict=True)]
        return np.pad(part, pads) if part.shape != local else part

    return jax.make_array_from_callback(shape, sharding, read)


def save_params(
    folder: Path,
    params: Mapping[str, Any],
    config: OvisConfig,
    *,
    dtype: DTypeLike | None = None,
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write parameters as a converted folder, which appears only when it is complete.

    All leaves must have one dtype unless `dtype` names the one to cast to. The padding that they
    have on a mesh is not written. `files` are further files by name, such as those of the
    tokenizer; without them only weights and configs are there.

    Raises:
      CheckpointError: `params` are not those of `config`, or are of several dtypes.
      OvisError: the folder exists and is not empty, or a leaf is not all on this host's devices.
      OSError: too little space, or a file cannot be written.
    """
    leaves = cut_padding(flatten_dict(params, sep="/"), param_axes(config), config)
    listing = list_arrays("params", leaves)
    known = (entry.dtype for entry in listing.tensors if entry.dtype in DTYPES)
    stored = None if dtype is not None else next(known, None)
    account(listing, config, own_keys(config), stored)
    target = stored or dtype_name(dtype)
    tensors = {path: (target, shape) for path, shape in param_shapes(config).items()}

    def chunks(path: str) -> Iterator[memoryview]:
        return array_pieces(cast(path, np.asarray(leaves[path]), target))

    check_space(folder, sum(tensor_bytes(*tensor) for tensor in tensors.values()))
    with whole_or_absent(folder) as partial:
        digests = write_tensors(partial, tensors, chunks, max_shard_bytes)
        config_json, generation_json = config.to_hf()
        write_json(partial / "config.json", with_dtype(config_json, target))
        write_json(partial / "generation_config.json", generation_json)
        for name, content in (files or {}).items():
            with naming_file(partial / name):
                (partial / name).write_bytes(content)
        write_json(partial / CONVERSION_FILE, conversion_record(tensors, digests))


def cut_padding(
    leaves: Mapping[str, Any], axes: Mapping[str, str], config: OvisConfig
) -> dict[str, Any]:
    """Arrays without the rows of zeros that they have on a mesh beyond those of the config.

    Rows that hold anything else are no padding: they stay, and are then a wrong shape.
    """
    cut = dict(leaves)
    for path, leaf in leaves.items():
        rows = true_rows(config, axes[path]) if path in axes else None
        if rows is None or not isinstance(leaf, jax.Array | np.ndarray):
            continue
        here = isinstance(leaf, np.ndarray) or leaf.is_fully_addressable
        if here and leaf.ndim and leaf.shape[0] > rows:
            whole = np.asarray(leaf)
            cut[path] = leaf if np.any(whole[rows:]) else whole[:rows]
    return cut


def list_arrays(name: str, leaves: Mapping[str, Any]) -> CheckpointFolder:
    """Arrays in memory as if they stood in a folder, so that they are held to the same account.

    Raises:
      OvisError: a leaf is not all on this host's devices.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries, problems = [], []
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray):
            found = type(leaf).__name__
            problems.append(Problem(name, path, "not an array", "an array", found))
        elif isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise OvisError(f"{path}: parts are on other hosts' devices; gather it to save it")
        else:
            dtype = names.get(leaf.dtype, str(leaf.dtype))
            entries.append(TensorEntry(Path(name), path, dtype, leaf.shape, 0, leaf.nbytes))
    unusable = frozenset(row.key for row in problems)
    return CheckpointFolder(Path(name), tuple(entries), {}, unusable, tuple(problems))
