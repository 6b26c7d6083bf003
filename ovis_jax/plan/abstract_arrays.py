"""Shapes, dtypes and shardings of the arrays in a workload, without their values."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ovis_jax.config import OvisConfig
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model.kv_cache import Cache, empty_cache
from ovis_jax.model.linear import Quantized
from ovis_jax.plan.workload import Workload
from ovis_jax.quantization import (
    QuantizationFormat,
    choose_quantization,
    quantized_matrices,
    quantized_shardings,
)
from ovis_jax.sharding import TENSOR, Rules, param_shapes, param_shardings


def abstract_params(workload: Workload, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Describe every parameter of a workload by path, as `abstract_params_by_rules` does."""
    return abstract_params_by_rules(
        workload.config, mesh, TENSOR, workload.dtype, workload.quantization
    )


def abstract_params_by_rules(
    config: OvisConfig,
    mesh: Mesh | AbstractMesh,
    rules: Rules,
    dtype: str,
    quantization_format: QuantizationFormat | None,
) -> dict[str, Any]:
    """Describe every parameter by path: its array, or the two arrays of a `Quantized` matrix.

    Raises:
      OvisError: The mesh cannot shard a parameter, or would split a group of an int4 matrix.
    """
    quantization = None
    if quantization_format is not None:
        quantization = choose_quantization(config, quantization_format)
    shardings = param_shardings(config, mesh, rules)
    matrices = quantized_matrices(config, quantization)

    def describe(path: str, shape: tuple[int, ...]) -> Any:
        if quantization is None or path not in matrices:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[path])
        (rows, inputs), group = shape, quantization.group_of(path)
        groups = None if group is None else inputs // group
        q, scale = quantized_shardings(path, shardings[path], groups)
        if groups is None:
            shapes = (rows, inputs), (rows,)
        else:
            shapes = (groups, rows, group), (groups, rows)
        arrays: Any = (
            jax.ShapeDtypeStruct(shapes[0], jnp.int8 if group is None else jnp.int4, sharding=q),
            jax.ShapeDtypeStruct(shapes[1], jnp.float32, sharding=scale),
        )
        return Quantized(*arrays)

    return {
        path: describe(path, shape) for path, shape in param_shapes(config, mesh, rules).items()
    }


def weights_per_device(params: Iterable[jax.ShapeDtypeStruct | Quantized]) -> int:
    """Count the weights on each device, without scales."""
    arrays = (x.q if isinstance(x, Quantized) else x for x in params)
    return sum(math.prod(shape_per_device(x)) for x in arrays)


def shape_per_device(x: Any) -> tuple[int, ...]:
    """Return the shape of the part of an array that is on each device."""
    return x.sharding.shard_shape(x.shape)


def abstract_cache(workload: Workload, mesh: Mesh | AbstractMesh) -> Cache:
    """Describe the KV cache; rows are sharded over "data" and key/value heads over "model"."""
    rows, length = workload.batch_size, workload.max_length
    cache = jax.eval_shape(
        lambda: empty_cache(
            workload.config.decoder, rows, length, workload.dtype, workload.kv_cache_dtype
        )
    )
    sharding = NamedSharding(mesh, PartitionSpec(TENSOR["B"], TENSOR["K"]))
    blocks = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), cache.blocks
    )
    return Cache(blocks, abstract_token_ids(mesh, (rows,)))


def abstract_token_ids(mesh: Mesh | AbstractMesh, shape: tuple[int, ...]) -> Any:
    """Describe an int32 array whose rows are sharded over "data"."""
    sharding = NamedSharding(mesh, PartitionSpec(TENSOR["B"]))
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)


def abstract_inputs(workload: Workload, mesh: Mesh | AbstractMesh) -> Inputs:
    """Describe the model inputs for prompts of the maximum length and their crops."""
    tokens = abstract_token_ids(mesh, (workload.batch_size, workload.prompt_positions))
    vision = workload.config.vision
    shape = (workload.num_crops, vision.image_size, vision.image_size, vision.num_channels)
    replicated = crops_per_device(workload) == workload.num_crops
    sharding = NamedSharding(mesh, PartitionSpec(None if replicated else TENSOR["B"]))
    pixels: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    return Inputs(tokens, tokens, pixels)


def crops_per_device(workload: Workload) -> int:
    """Count the crops on each device; all crops if axis "data" does not divide their number."""
    crops, data = workload.num_crops, workload.mesh_sizes.data
    return crops if crops % data else crops // data


def matrix_shapes(workload: Workload) -> list[tuple[int, ...]]:
    """Return the full and the per-device shapes of all matrices.

    For an int4 matrix, the result includes both the shape [o, i] and the shape [G, o, g].
    """
    unquantized = replace(workload, quantization=None)
    trees = (abstract_params(x, workload.abstract_mesh) for x in (workload, unquantized))
    return _all_shapes(list(trees))


def cache_shapes(workload: Workload) -> list[tuple[int, ...]]:
    """Return the full and the per-device shapes of the KV cache of all blocks."""
    return _all_shapes(abstract_cache(workload, workload.abstract_mesh).blocks)


def _all_shapes(tree: Any) -> list[tuple[int, ...]]:
    shapes = set()
    for x in jax.tree.leaves(tree):
        if len(x.shape) > 1:
            shapes |= {x.shape, shape_per_device(x)}
    return sorted(shapes)
