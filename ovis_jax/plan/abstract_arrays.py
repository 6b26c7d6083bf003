"""Shapes, dtypes and shardings of the arrays in a workload, without their values."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ovis_jax.inputs.batch import Inputs
from ovis_jax.model.kv_cache import Cache, num_slots
from ovis_jax.plan.workload import Workload
from ovis_jax.sharding import TENSOR, param_shapes, param_shardings


def abstract_params(
    workload: Workload, mesh: Mesh | AbstractMesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Describe the array of every parameter, by path."""
    shardings = param_shardings(workload.config, mesh, TENSOR)
    shapes = param_shapes(workload.config, mesh, TENSOR)
    return {
        path: jax.ShapeDtypeStruct(shape, workload.dtype, sharding=shardings[path])
        for path, shape in shapes.items()
    }


def abstract_cache(workload: Workload, mesh: Mesh | AbstractMesh) -> Cache:
    """Describe the KV cache; rows are sharded over "data" and key/value heads over "model"."""
    c = workload.config.decoder
    sharding = NamedSharding(mesh, PartitionSpec(TENSOR["B"], TENSOR["K"]))

    def keys_or_values(block: int) -> Any:
        slots = num_slots(c, block, workload.max_length)
        shape = (workload.batch_size, c.num_kv_heads, slots, c.head_dim)
        return jax.ShapeDtypeStruct(shape, workload.dtype, sharding=sharding)

    blocks = tuple((keys_or_values(i), keys_or_values(i)) for i in range(c.depth))
    return Cache(blocks, abstract_token_ids(mesh, (workload.batch_size,)))


def abstract_token_ids(mesh: Mesh | AbstractMesh, shape: tuple[int, ...]) -> Any:
    """Describe an int32 array whose rows are sharded over "data"."""
    sharding = NamedSharding(mesh, PartitionSpec(TENSOR["B"]))
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)


def abstract_inputs(workload: Workload, mesh: Mesh | AbstractMesh) -> Inputs:
    """Describe the model inputs for prompts of the maximum length and their crops."""
    tokens = abstract_token_ids(mesh, (workload.batch_size, workload.max_length))
    vision = workload.config.vision
    shape = (workload.num_crops, vision.image_size, vision.image_size, vision.num_channels)
    replicated = crops_per_device(workload) == workload.num_crops
    sharding = NamedSharding(mesh, PartitionSpec(None if replicated else TENSOR["B"]))
    pixels: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    return Inputs(tokens, tokens, pixels)


def crops_per_device(workload: Workload) -> int:
    """Count the crops on each device; all crops if mesh axis "data" does not divide them."""
    crops, data = workload.num_crops, workload.mesh_sizes.data
    return crops if crops % data else crops // data


def decoder_matrix_shapes(workload: Workload) -> list[tuple[int, ...]]:
    """Return the full and the per-device shapes of the decoder's matrices."""
    found = []
    for path, x in abstract_params(workload, workload.abstract_mesh).items():
        if path.startswith("decoder/") and len(x.shape) == 2:
            found += [x.shape, x.sharding.shard_shape(x.shape)]
    return found
