"""Arrays that are on the devices of several processes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding


def shard_array(x: Any, sharding: Sharding) -> jax.Array:
    """Shard an array that every process has in full; a process puts parts on its devices only.

    Unlike `jax.device_put`, this function does not compare the arrays of all processes.

    Args:
      x: A host array, an array on a device of this process, or an array of random keys.
      sharding: Sharding of the result.
    """
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = shard_array(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def is_global(x: Any) -> bool:
    """Return whether an array is on devices of several processes, in parts or in full."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def gather_array(x: Any) -> np.ndarray:
    """Return an array as a host array; if `is_global(x)`, all processes must call this function."""
    if is_global(x) and not x.is_fully_replicated:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
