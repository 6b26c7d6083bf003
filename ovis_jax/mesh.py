"""Creating meshes, and running under a caller's mesh that may have explicit axes.

Inside the model, the compiler chooses the shardings of intermediate values. JAX calls the axes of a
mesh automatic in this case. If the caller's mesh has explicit axes, for example from
`jax.make_mesh`, the model's functions switch to the same mesh with automatic axes, and switch back
when they return.
"""

from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from ovis_jax.distributed import describe_devices
from ovis_jax.errors import OvisError

Function = TypeVar("Function", bound=Callable[..., Any])
Result = TypeVar("Result")


def data_model_mesh(data: int, model: int) -> Mesh:
    """Create a mesh of the first devices, with automatic axes "data" and "model".

    Raises:
      OvisError: There are fewer than `data` x `model` devices.
    """
    needed, devices = data * model, jax.devices()
    if needed > len(devices):
        raise OvisError(
            f"mesh: data {data} x model {model} needs {needed} devices, and JAX has {len(devices)}"
        )
    return Mesh(np.array(devices[:needed]).reshape(data, model), ("data", "model"))


def tensor_parallel_mesh(num_devices: int) -> Mesh | None:
    """Create a mesh for tensor parallelism, or return None for a single device.

    Raises:
      OvisError: There are fewer than `num_devices` devices, or there are several processes with
        more devices.
    """
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    if several and num_devices != jax.device_count():
        raise OvisError(
            f"tensor parallelism is {num_devices}, expected all {jax.device_count()} devices of the"
            f" {jax.process_count()} processes ({describe_devices()})"
        )
    return None if num_devices == 1 else data_model_mesh(1, num_devices)


def data_parallel_meshes(num_engines: int, num_devices: int) -> list[Mesh | None]:
    """Create a mesh for tensor parallelism for each of several engines, of separate devices.

    Returns:
      Meshes of `num_devices` devices; for a single engine, the mesh of `tensor_parallel_mesh`.

    Raises:
      OvisError: There are fewer than `num_engines` x `num_devices` devices.
    """
    if num_engines == 1:
        return [tensor_parallel_mesh(num_devices)]
    mesh = data_model_mesh(num_engines, num_devices)
    return [Mesh(devices[None], mesh.axis_names) for devices in mesh.devices]


def run_with_automatic_axes(function: Function) -> Function:
    """Wrap a function of arrays so that it runs with automatic axes.

    The wrapper sets the axis types of a mesh to Auto. This is the mesh in scope or, if there is
    none, the mesh that the arguments are sharded over. Pass the results to another wrapped function
    or to `replicate_if_explicit`.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        arrays = (x for x in jax.tree.leaves((args, kwargs)) if isinstance(x, jax.Array))
        meshes = chain([jax.sharding.get_abstract_mesh()], map(_mesh_of, arrays))
        mesh = next(filter(_is_explicit, meshes), None)
        if mesh is None:
            return function(*args, **kwargs)
        types = dict.fromkeys(mesh.axis_names, AxisType.Auto)
        with jax.sharding.use_abstract_mesh(mesh.update_axis_types(types)):
            args, kwargs = jax.tree.map(_reshard_explicit, (args, kwargs))
            return function(*args, **kwargs)

    return cast(Function, run)


def replicate_if_explicit(results: Result) -> Result:
    """Replicate results if the mesh in scope has explicit axes, which need known shardings."""
    if not _is_explicit(jax.sharding.get_abstract_mesh()):
        return results
    return jax.sharding.reshard(results, PartitionSpec())


def allow_explicit_mesh(function: Function) -> Function:
    """Wrap a function of arrays so that it can be called under a mesh with explicit axes.

    The function runs with automatic axes. If the caller's axes are explicit, the results are
    replicated.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return replicate_if_explicit(run_with_automatic_axes(function)(*args, **kwargs))

    return cast(Function, run)


def _is_explicit(mesh: AbstractMesh) -> bool:
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def _mesh_of(x: jax.Array) -> AbstractMesh:
    return jax.typeof(x).sharding.mesh


def _reshard_explicit(x: Any) -> Any:
    if isinstance(x, jax.Array) and _is_explicit(_mesh_of(x)):
        return jax.sharding.reshard(x, PartitionSpec())
    return x
