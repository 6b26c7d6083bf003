"""The workload that a plan is made for: a model, devices, and the largest batch of requests."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from ovis_jax.config import OvisConfig
from ovis_jax.errors import OvisError
from ovis_jax.inputs.buckets import CROP_BUCKET, bucket_size
from ovis_jax.plan.topologies import MeshSizes, Topology
from ovis_jax.sharding import TENSOR, param_shardings


@dataclass(frozen=True)
class Workload:
    """A model on a topology and the largest batch that it must answer there."""

    config: OvisConfig
    topology: Topology
    mesh_sizes: MeshSizes
    batch_size: int
    max_length: int
    """Maximum positions per row: prompt and answer together. A prompt alone may be as long."""
    images_per_row: int = 0
    max_partition: int = 9
    """Maximum number of cells that an image is split into."""
    dtype: str = "bfloat16"
    """Dtype of the weights and the KV cache."""

    @property
    def abstract_mesh(self) -> AbstractMesh:
        """The mesh without devices."""
        return AbstractMesh(self.mesh_sizes, ("data", "model"))

    @property
    def crops_per_row(self) -> int:
        """Maximum crops per row. An image split into several cells also has a full-image crop."""
        return self.images_per_row * (self.max_partition + (self.max_partition > 1))

    @property
    def num_crops(self) -> int:
        """I: crops of the batch, padded to a bucket."""
        return bucket_size(self.batch_size * self.crops_per_row, CROP_BUCKET)

    @property
    def visual_tokens_per_row(self) -> int:
        """Positions of a row that hold visual tokens."""
        return self.crops_per_row * self.config.visual_tokenizer.tokens_per_crop

    @property
    def bytes_per_weight(self) -> int:
        """Bytes of one weight."""
        return jnp.dtype(self.dtype).itemsize

    def validate(self) -> None:
        """Check that the sizes are valid and that the mesh can hold the arrays.

        Raises:
          OvisError: a size is too small, the mesh sizes do not multiply to the number of devices,
            a mesh axis does not divide a dimension (the message names letter, size and axis), or
            the images alone exceed `max_length`.
        """
        sizes = {
            "batch": self.batch_size,
            "max-length": self.max_length,
            "max-partition": self.max_partition,
        }
        for name, size in sizes.items():
            if size < 1:
                raise OvisError(f"{name} is {size}, expected at least 1")
        if self.images_per_row < 0:
            raise OvisError(f"images is {self.images_per_row}, expected at least 0")
        data, model = self.mesh_sizes
        devices = self.topology.num_devices
        if data * model != devices:
            raise OvisError(
                f"mesh data={data},model={model} needs {data * model} devices, but"
                f" {self.topology.name} has {devices}; choose sizes whose product is {devices}"
            )
        param_shardings(self.config, self.abstract_mesh, TENSOR)
        if self.batch_size % data:
            raise OvisError(
                f"letter B has size {self.batch_size}, which mesh axis 'data' of size {data} does"
                f" not divide; use a batch that is a multiple of {data}, or a smaller 'data'"
            )
        if self.visual_tokens_per_row > self.max_length:
            raise OvisError(
                f"{self.images_per_row} images of up to"
                f" {self.crops_per_row // self.images_per_row} crops take"
                f" {self.visual_tokens_per_row} positions, but max-length is {self.max_length};"
                " use fewer images, a smaller max-partition or a longer max-length"
            )


def default_mesh_sizes(config: OvisConfig, num_devices: int) -> MeshSizes:
    """Choose mesh sizes with the largest "model" axis that divides all sharded dimensions."""
    divisors = (n for n in range(num_devices, 0, -1) if num_devices % n == 0)
    model = next(n for n in divisors if _can_shard(config, n))
    return MeshSizes(num_devices // model, model)


def _can_shard(config: OvisConfig, model_axis_size: int) -> bool:
    try:
        param_shardings(config, AbstractMesh((1, model_axis_size), ("data", "model")), TENSOR)
    except OvisError:
        return False
    return True
