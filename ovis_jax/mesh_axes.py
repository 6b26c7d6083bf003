"""Meshes, made and met: of those met, axes may be what JAX calls explicit, as by `jax.make_mesh`.

The model leaves it to the compiler how arrays between parameters lie ("automatic" axes). So under a
mesh with explicit axes it steps into the same mesh with automatic ones, and out of it again.
"""

from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from ovis_jax.errors import OvisError

Function = TypeVar("Function", bound=Callable[..., Any])
Result = TypeVar("Result")


def first_devices(data: int, model: int) -> Mesh:
    """The first data x model devices as a mesh with automatic axes "data" and "model".

    Raises:
      OvisError: there are not so many.
    """
    need, devices = data * model, jax.devices()
    if need > len(devices):
        raise OvisError(
            f"mesh: data {data} x model {model} is {need} devices, and JAX has {len(devices)}"
        )
    return Mesh(np.array(devices[:need]).reshape(data, model), ("data", "model"))


def tensor_parallel(devices: int) -> Mesh | None:
    """The mesh of a model that is cut over so many devices; None where it is not cut.

    Raises:
      OvisError: there are not so many.
    """
    return None if devices == 1 else first_devices(1, devices)


def automatic(mesh: Mesh) -> Mesh:
    """The same devices and axes, all of them automatic."""
    return Mesh(mesh.devices, mesh.axis_names)


def with_automatic_axes(function: Function) -> Function:
    """Run a function of arrays with all axes of the mesh in scope, or of theirs, automatic.

    Arrays among its arguments are taken over as they lie; what it returns is to be given to another
    such function, or to `replicated`.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        arrays = (x for x in jax.tree.leaves((args, kwargs)) if isinstance(x, jax.Array))
        meshes = chain([jax.sharding.get_abstract_mesh()], map(_mesh_of, arrays))
        mesh = next(filter(_explicit, meshes), None)
        if mesh is None:
            return function(*args, **kwargs)
        types = dict.fromkeys(mesh.axis_names, AxisType.Auto)
        with jax.sharding.use_abstract_mesh(mesh.update_axis_types(types)):
            args, kwargs = jax.tree.map(_taken_over, (args, kwargs))
            return function(*args, **kwargs)

    return cast(Function, run)


def replicated(results: Result) -> Result:
    """Results that the caller's own program can go on with: whole on every device, if it must be.

    They are left as they lie unless the mesh in scope has explicit axes, which want that said.
    """
    if not _explicit(jax.sharding.get_abstract_mesh()):
        return results
    return jax.sharding.reshard(results, PartitionSpec())


def _explicit(mesh: AbstractMesh) -> bool:
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def under_any_mesh(function: Function) -> Function:
    """`with_automatic_axes` and then `replicated`: for what a caller's own program may hold."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return replicated(with_automatic_axes(function)(*args, **kwargs))

    return cast(Function, run)


def _mesh_of(x: jax.Array) -> AbstractMesh:
    return jax.typeof(x).sharding.mesh


def _taken_over(x: Any) -> Any:
    if isinstance(x, jax.Array) and _explicit(_mesh_of(x)):
        return jax.sharding.reshard(x, PartitionSpec())
    return x
