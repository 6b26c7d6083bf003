"""The workload of a training plan: a recipe, its model, the devices, and the largest row."""

import re
from dataclasses import dataclass

from jax.sharding import AbstractMesh

from ovis_jax.config import OvisConfig
from ovis_jax.errors import OvisError, count_noun
from ovis_jax.plan.topologies import MeshSizes, Topology
from ovis_jax.sharding import RULES_BY_NAME, TENSOR, Rules, adapter_axes
from ovis_jax.training.config import TrainConfig, check_micro_batch_size
from ovis_jax.training.trainable import PART_BY_PREFIX


@dataclass(frozen=True)
class TrainingWorkload:
    """A recipe, the config of its model, the topology that it runs on, and its largest row."""

    config: OvisConfig
    recipe: TrainConfig
    topology: Topology
    images_per_row: int = 1
    """Maximum number of images in a row."""

    @property
    def mesh_sizes(self) -> MeshSizes:
        """The sizes of the recipe's mesh; without a mesh, a run uses one device."""
        mesh = self.recipe.mesh
        return MeshSizes(1, 1) if mesh is None else MeshSizes(mesh.data, mesh.model)

    @property
    def abstract_mesh(self) -> AbstractMesh:
        """The mesh as an abstract mesh, which has no devices."""
        return AbstractMesh(self.mesh_sizes, ("data", "model"))

    @property
    def rules(self) -> Rules:
        """The rules for sharding the parameters."""
        return RULES_BY_NAME[self.recipe.mesh.rules] if self.recipe.mesh else TENSOR

    @property
    def length(self) -> int:
        """T, the maximum number of positions per row, with padding."""
        data, limit = self.recipe.data, self.config.multimodal_max_length
        unit = data.pad_to_multiple_of
        return -(-min(data.max_length or limit, limit) // unit) * unit

    @property
    def crops_per_row(self) -> int:
        """Maximum number of crops per row, of those whose visual tokens fit into the row."""
        if not self.images_per_row:
            return 0
        cells = self.recipe.data.max_partition_for(self.images_per_row)
        crops = self.images_per_row * (cells + (cells > 1))
        return min(crops, self.length // self.config.visual_tokenizer.tokens_per_crop)

    @property
    def rows_per_device(self) -> int:
        """Number of rows of a micro-batch on each device."""
        return self.recipe.data.micro_batch_size // self.mesh_sizes.data

    @property
    def is_preference(self) -> bool:
        """Whether a row is a pair of a chosen and a rejected answer."""
        return self.recipe.training.objective == "dpo"

    @property
    def training_method(self) -> str:
        """The trained parts, or the adapters and the format of the frozen matrices."""
        recipe = self.recipe
        if recipe.lora is None:
            return f"training of {', '.join(recipe.trainable)}"
        if recipe.quantization is None:
            return f"LoRA of rank {recipe.lora.rank}"
        return f"QLoRA of rank {recipe.lora.rank} on {recipe.quantization} matrices"

    @property
    def trains_vision(self) -> bool:
        """Whether gradients pass through the vision encoder or the visual tokenizer."""
        if self.recipe.lora is None:
            return "visual_tokenizer" in self.recipe.trainable
        pattern = self.recipe.lora.target_modules
        matrices = (x.rpartition("/")[0] for x in adapter_axes(self.config))
        return any(
            PART_BY_PREFIX[path.partition("/")[0]] == "visual_tokenizer"
            for path in matrices
            if re.fullmatch(pattern, path)
        )

    @property
    def accumulates(self) -> bool:
        """Whether the gradients of several micro-batches are added up."""
        return self.recipe.data.gradient_accumulation_steps > 1

    def validate(self) -> None:
        """Check that the mesh has enough devices, and that it can divide a micro-batch.

        Raises:
          OvisError: The model does not support the dtype, or the mesh has more devices than the
            topology.
          TrainingError: The mesh does not divide the micro-batch.
        """
        self.config.check_compute_dtype(self.recipe.training.compute_dtype)
        data, model = self.mesh_sizes
        if data * model > self.topology.num_devices:
            raise OvisError(
                f"mesh: data {data} x model {model} needs {count_noun(data * model, 'device')}, but"
                f" {self.topology.name} has {self.topology.num_devices}; choose a larger topology,"
                " or set mesh.data and mesh.model"
            )
        check_micro_batch_size(self.recipe)
