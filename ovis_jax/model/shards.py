"""A hand-written kernel on a mesh: each device runs it on the rows and heads that lie there."""

from collections.abc import Callable

import jax
from jax import Array
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Float, Int

from ovis_jax.sharding import TENSOR


def on_each_device(
    kernel: Callable[[Array, Array, Array, Array], Array],
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    rows: Int[Array, "B T"],
) -> Float[Array, "B N T H"]:
    """Call a kernel of whole rows and heads under the mesh in scope, or that of the queries.

    Compilers do not look into such kernels, so it is said here how their arguments are cut.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        mesh = jax.typeof(q).sharding.mesh  # it comes from the parameters
    if not mesh.empty and not mesh.manual_axes:
        batch, heads = axis_of("B", q.shape[0], mesh), axis_of("K", k.shape[1], mesh)
        spec = PartitionSpec(batch, heads)
        specs = (spec, spec, spec, PartitionSpec(batch))
        kernel = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return kernel(q, k, v, rows)


def axis_of(letter: str, size: int, mesh: Mesh | AbstractMesh) -> str | None:
    """The mesh axis of a letter; None, so that each device has all of it, where it cannot lie."""
    axis = TENSOR[letter]
    return axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None
