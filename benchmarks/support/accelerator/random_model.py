"""A model with random weights, made on the device without a file."""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from ovis_jax import Ovis
from ovis_jax.config import OvisConfig
from ovis_jax.mesh import tensor_parallel_mesh
from ovis_jax.model.ovis import Params
from ovis_jax.plan.workload import default_mesh_sizes
from ovis_jax.sharding import param_shapes, param_shardings


@dataclass(frozen=True)
class RandomModel:
    """A model with random weights in bfloat16.

    Attributes:
      config: The config; no token ends an answer.
      model: The model.
      params: Random weights, sharded over the devices.
      mesh: The mesh, or None on a single device.
    """

    config: OvisConfig
    model: Ovis
    params: Params
    mesh: Mesh | None


def max_shardable_devices(config: OvisConfig) -> int:
    """Return the number of devices that the model is sharded over: the largest that it allows."""
    return default_mesh_sizes(config, jax.device_count()).model


def param_bytes_per_device(config: OvisConfig) -> int:
    """Sum the bytes of the bfloat16 weights on each device."""
    return 2 * sum(map(math.prod, param_shapes(config).values())) // max_shardable_devices(config)


def make_random_model(config: OvisConfig) -> RandomModel:
    """Make random weights of a config on the devices, one array at a time."""
    config = replace(config, eos_ids=())
    mesh = tensor_parallel_mesh(max_shardable_devices(config))
    shapes = param_shapes(config, mesh)
    shardings = param_shardings(config, mesh) if mesh else dict.fromkeys(shapes)

    @cache
    def make(shape: tuple[int, ...], sharding: Any) -> Any:
        def draw(key: jax.Array) -> jax.Array:
            scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
            return (jax.random.normal(key, shape, jnp.bfloat16) * scale).astype(jnp.bfloat16)

        return jax.jit(draw, out_shardings=sharding)

    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(shapes))
    flat = {
        path: make(shape, shardings[path])(key)
        for (path, shape), key in zip(shapes.items(), keys, strict=True)
    }
    params = unflatten_dict(flat, sep="/")
    jax.block_until_ready(params)
    return RandomModel(config, Ovis(config), params, mesh)


random_model = cache(make_random_model)
"""`make_random_model`, once per process and config."""
