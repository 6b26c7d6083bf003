"""What a plan is asked about, and the shapes of its arrays, each with its place on the mesh."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ovis_jax.config import OvisConfig
from ovis_jax.errors import OvisError
from ovis_jax.inputs.batch import CROP_BUCKET, Inputs, bucket
from ovis_jax.model.kv_cache import Cache, num_slots
from ovis_jax.plan.devices import Topology
from ovis_jax.sharding import TENSOR, param_shapes, param_shardings


@dataclass(frozen=True)
class Case:
    """A model on devices, and the largest request that it is to answer there."""

    config: OvisConfig
    topology: Topology
    data: int
    """Size of mesh axis "data"."""
    model: int
    """Size of mesh axis "model"."""
    batch: int
    max_length: int
    """Positions a row may reach; a prompt may be as long."""
    images: int = 0
    """In each row."""
    max_partition: int = 9
    """The most cells that an image is cut into; with more than one, the whole is a crop too."""
    dtype: str = "bfloat16"

    @property
    def mesh(self) -> AbstractMesh:
        """The mesh, without devices."""
        return AbstractMesh((self.data, self.model), ("data", "model"))

    @property
    def crops(self) -> int:
        """I, of the whole batch, with those that fill up a bucket."""
        return bucket(self.batch * self.images * crops_an_image(self.max_partition), CROP_BUCKET)

    @property
    def visual_positions(self) -> int:
        """The visual tokens of a row."""
        tokens = self.config.visual_tokenizer.tokens_per_crop
        return self.images * crops_an_image(self.max_partition) * tokens

    @property
    def item_bytes(self) -> int:
        """Bytes of one weight."""
        return jnp.dtype(self.dtype).itemsize

    def check(self) -> None:
        """Raise for what cannot lie on the mesh, or does not go together.

        Raises:
          OvisError: a mesh axis does not divide a dimension (letter, size and axis named), the mesh
            has not as many places as there are devices, or the images alone are too long.
        """
        if self.batch < 1 or self.max_length < 1 or self.images < 0 or self.max_partition < 1:
            raise OvisError(
                "batch, max-length and max-partition are at least 1, images at least 0; found"
                f" {self.batch}, {self.max_length}, {self.max_partition} and {self.images}"
            )
        devices = self.topology.num_devices
        if self.data * self.model != devices:
            raise OvisError(
                f"mesh data={self.data},model={self.model} has {self.data * self.model} places and"
                f" {self.topology.name} has {devices} devices; the sizes must multiply to {devices}"
            )
        param_shardings(self.config, self.mesh, TENSOR)
        if self.batch % self.data:
            raise OvisError(
                f"letter B has size {self.batch}, which mesh axis 'data' of size {self.data} does"
                f" not divide; use a batch that is a multiple of {self.data}, or a smaller 'data'"
            )
        if self.visual_positions > self.max_length:
            raise OvisError(
                f"{self.images} images of up to {crops_an_image(self.max_partition)} crops take"
                f" {self.visual_positions} positions, max-length is {self.max_length}; use fewer"
                " images, a smaller max-partition or a longer max-length"
            )


def crops_an_image(max_partition: int) -> int:
    """The most crops that one image gives: its cells, and the whole beside them."""
    return max_partition + (max_partition > 1)


def default_mesh(config: OvisConfig, devices: int) -> tuple[int, int]:
    """Sizes of "data" and "model": as much of the devices on "model" as all dimensions allow."""
    model = max(n for n in range(1, devices + 1) if not devices % n and _divides(config, n))
    return devices // model, model


def _divides(config: OvisConfig, model: int) -> bool:
    try:
        param_shardings(config, AbstractMesh((1, model), ("data", "model")), TENSOR)
    except OvisError:
        return False
    return True


def params(case: Case, mesh: Mesh | AbstractMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter by its path."""
    places = param_shardings(case.config, mesh, TENSOR)
    shapes = param_shapes(case.config, mesh, TENSOR)
    return {
        path: jax.ShapeDtypeStruct(shape, case.dtype, sharding=places[path])
        for path, shape in shapes.items()
    }


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Parameters as the model takes them."""
    return unflatten_dict(flat, sep="/")


def cache(case: Case, mesh: Mesh | AbstractMesh) -> Cache:
    """The cache: rows over "data", key heads over "model"."""
    c = case.config.decoder
    heads = NamedSharding(mesh, PartitionSpec(TENSOR["B"], TENSOR["K"]))

    def half(block: int) -> Any:
        slots = num_slots(c, block, case.max_length)
        sizes = (case.batch, c.num_kv_heads, slots, c.head_dim)
        return jax.ShapeDtypeStruct(sizes, case.dtype, sharding=heads)

    blocks = tuple((half(i), half(i)) for i in range(c.depth))
    return Cache(blocks, tokens(case, mesh, (case.batch,)))


def tokens(case: Case, mesh: Mesh | AbstractMesh, sizes: tuple[int, ...]) -> Any:
    """Whole numbers, rows over "data"."""
    place = NamedSharding(mesh, PartitionSpec(TENSOR["B"]))
    return jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=place)


def inputs(case: Case, mesh: Mesh | AbstractMesh) -> Inputs:
    """Prompts as long as they may be; crops over "data" where it divides them."""
    rows = tokens(case, mesh, (case.batch, case.max_length))
    vision = case.config.vision
    side = vision.image_size
    sizes = (case.crops, side, side, vision.num_channels)
    over = None if crops_a_device(case) == case.crops else TENSOR["B"]
    place = NamedSharding(mesh, PartitionSpec(over))
    pixels: Any = jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=place)
    return Inputs(rows, rows, pixels)


def crops_a_device(case: Case) -> int:
    """How many crops a device looks at: all where "data" does not divide them."""
    return case.crops if case.crops % case.data else case.crops // case.data


def matrix_shapes(case: Case) -> list[tuple[int, ...]]:
    """Shapes of the decoder's matrices, whole and on one device."""
    found = []
    places = param_shardings(case.config, case.mesh, TENSOR)
    for path, shape in param_shapes(case.config, case.mesh, TENSOR).items():
        if path.startswith("decoder/") and len(shape) == 2:
            found += [shape, places[path].shard_shape(shape)]
    return found
