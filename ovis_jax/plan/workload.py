"""The workload of a plan: a model, the devices, and the largest batch of requests."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from ovis_jax.config import OvisConfig
from ovis_jax.errors import OvisError, count_noun
from ovis_jax.inputs.buckets import CROP_BUCKET, bucket_size
from ovis_jax.model.kv_cache import KVCacheDtype
from ovis_jax.plan.topologies import MeshSizes, Topology
from ovis_jax.quantization import QuantizationFormat
from ovis_jax.sharding import TENSOR, param_shardings


@dataclass(frozen=True)
class Workload:
    """A model, the topology that it runs on, and the largest batch that it must answer."""

    config: OvisConfig
    topology: Topology
    mesh_sizes: MeshSizes
    batch_size: int
    max_length: int
    """Maximum total length of a prompt and its answer, in positions."""
    images_per_row: int = 0
    max_partition: int = 9
    """Maximum number of cells that an image is cut into."""
    dtype: str = "bfloat16"
    """Dtype of activations, of weights that are not quantized, and of the KV cache by default."""
    quantization: QuantizationFormat | None = None
    """Quantization of the weights; None for no quantization."""
    kv_cache_dtype: KVCacheDtype = "auto"
    """Dtype of the KV cache; "auto" is `dtype`."""
    prompt_length: int | None = None
    """Maximum length of a prompt, in positions; None for `max_length`."""

    @property
    def abstract_mesh(self) -> AbstractMesh:
        """The mesh as an abstract mesh, which has no devices."""
        return AbstractMesh(self.mesh_sizes, ("data", "model"))

    @property
    def prompt_positions(self) -> int:
        """Maximum length of a prompt, in positions."""
        return min(self.prompt_length or self.max_length, self.max_length)

    @property
    def crops_per_row(self) -> int:
        """Maximum crops per row. An image with several cells also has a full-image crop."""
        return self.images_per_row * (self.max_partition + (self.max_partition > 1))

    @property
    def num_crops(self) -> int:
        """I, the number of crops in the batch, padded to a bucket."""
        return bucket_size(self.batch_size * self.crops_per_row, CROP_BUCKET)

    @property
    def visual_tokens_per_row(self) -> int:
        """Number of positions in a row that are visual tokens."""
        return self.crops_per_row * self.config.visual_tokenizer.tokens_per_crop

    @property
    def bytes_per_activation(self) -> int:
        """Number of bytes per activation."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def peak_flops(self) -> float:
        """Peak rate of floating point operations in `dtype` on one device, per second."""
        device = self.topology.device
        return (self.dtype != "float16" and device.emulated_bfloat16_flops) or device.peak_flops

    def validate(self) -> None:
        """Check that the mesh can shard the arrays, and that the images fit into the rows.

        Raises:
          OvisError: The model does not support the dtype, the product of the mesh sizes is not the
            number of devices, a mesh axis does not divide a dimension (the message names the
            letter, the size and the axis), or the images alone are longer than the maximum length
            of a prompt.
        """
        self.config.check_compute_dtype(self.dtype)
        data, model = self.mesh_sizes
        devices = self.topology.num_devices
        if data * model != devices:
            raise OvisError(
                f"mesh data={data},model={model} needs {count_noun(data * model, 'device')}, but"
                f" {self.topology.name} has {devices}; choose sizes whose product is {devices}"
            )
        param_shardings(self.config, self.abstract_mesh, TENSOR)
        if self.batch_size % data:
            raise OvisError(
                f"letter B has size {self.batch_size}, which mesh axis 'data' of size {data} does"
                f" not divide; use a batch-size that is a multiple of {data}, or a smaller 'data'"
            )
        if self.visual_tokens_per_row > self.prompt_positions:
            raise OvisError(
                f"the crops of {count_noun(self.images_per_row, 'image')} may take"
                f" {self.visual_tokens_per_row} positions, but a prompt may take"
                f" {self.prompt_positions}; use fewer images, a smaller max-partition or a larger"
                " max-model-len"
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
