"""Estimating the memory that a training step needs on one device, without compilation."""

from dataclasses import dataclass, replace
from functools import lru_cache

import jax.numpy as jnp

from ovis_jax.inference.label_logits import LOGITS_PER_CHUNK
from ovis_jax.plan.hlo_analysis import bytes_per_device
from ovis_jax.plan.memory_estimate import (
    COMPILER_RESERVED_BYTES,
    FLOAT32_BYTES,
    score_bytes,
    vision_temp_bytes,
)
from ovis_jax.plan.workload import Workload
from ovis_jax.sharding import axis_letter_sizes
from ovis_jax.training.abstract_step import abstract_step
from ovis_jax.training.config import RunConfig
from ovis_jax.training.training_workload import TrainingWorkload


@dataclass(frozen=True)
class TrainingMemory:
    """The memory of a training step, in bytes on one device."""

    trainable: int
    """Bytes of the trainable parameters or adapters, in float32; exact."""
    optimizer: int
    """Bytes of the optimizer's state; exact."""
    frozen: int
    """Bytes of the frozen parameters; exact."""
    reference: int
    """Bytes of the parameters of DPO's reference model that are not frozen parameters; exact."""
    gradients: int
    """Bytes of the gradients in float32, and of their sums over several micro-batches."""
    activations: int
    """Bytes of all other arrays of a step; estimated."""

    @property
    def kept(self) -> int:
        """Bytes of the arrays that are in memory between steps."""
        return self.trainable + self.optimizer + self.frozen + self.reference

    @property
    def peak(self) -> int:
        """Bytes of all arrays together."""
        return self.kept + self.gradients + self.activations


def estimate_training_memory(workload: TrainingWorkload) -> TrainingMemory:
    """Estimate the memory that a training step needs on one device.

    The sizes of parameters and optimizer state are exact, because they follow from the padded and
    sharded shapes. `activation_bytes` documents the formula of the other arrays.

    Raises:
      OvisError: The mesh cannot shard a parameter, or a trainable part is quantized.
    """
    kept = _kept_bytes(_with_one_row(workload))
    gradients = kept[0] * (1 + workload.accumulates)
    return TrainingMemory(*kept, gradients, activation_bytes(workload))


def _with_one_row(workload: TrainingWorkload) -> TrainingWorkload:
    """Return the workload with default values for what does not change the kept arrays."""
    recipe = workload.recipe
    rows = {"micro_batch_size": workload.mesh_sizes.data, "gradient_accumulation_steps": 1}
    data = recipe.data.model_copy(update=rows)
    return replace(workload, recipe=recipe.model_copy(update={"data": data, "run": RunConfig()}))


@lru_cache
def _kept_bytes(workload: TrainingWorkload) -> tuple[int, int, int, int]:
    """Return the bytes of the trainable, optimizer, frozen and reference arrays."""
    step = abstract_step(workload, workload.abstract_mesh)
    arrays = step.state.trainable, step.state.opt_state, step.frozen, step.reference
    trainable, optimizer, frozen, reference = map(bytes_per_device, arrays)
    return trainable, optimizer, frozen, reference


def activation_bytes(workload: TrainingWorkload) -> int:
    """Estimate the size of a step's temporary arrays without gradients, in bytes on one device.

    Let b be the number of rows per device (of both answers with DPO), m the size of the mesh axis
    "model", and s the number of bytes per element. The result is the sum of these terms:

    - one decoder block, s b T (6 D + (2 (N + 2 K) H + 4 F) / m), plus its attention scores if no
      kernel keeps them on the chip. With remat, there are two of these, and the residual s b T D of
      every block. Without remat, there is one for every block.
    - logits, three float32 arrays of at most `LOGITS_PER_CHUNK` elements;
    - the embeddings of the images, s I M D;
    - `vision_temp_bytes`. If the vision encoder or the visual tokenizer is trained, this term is
      doubled, and s I P E is added for every block of the encoder (without remat, a whole block).
    - copies of the trainable parameters in the compute dtype;
    - if the parameters are sharded over "data", two gathered decoder blocks and the gathered text
      embedding, with its float32 gradient if it is trained.
    """
    config, recipe = workload.config, workload.recipe
    inference, s = _forward_workload(workload), jnp.dtype(recipe.training.compute_dtype).itemsize
    n = axis_letter_sizes(config, "decoder/")
    data, m = workload.mesh_sizes
    sides = 1 + workload.is_preference
    rows, T, D = sides * workload.rows_per_device, workload.length, n["D"]
    sharded = 2 * (n["N"] + 2 * n["K"]) * n["H"] + 4 * n["F"]
    block = s * rows * T * (6 * D + sharded // m) + score_bytes(
        inference, "prefill", rows, n["N"], T
    )
    depth = config.decoder.depth
    total = depth * s * rows * T * D + 2 * block if recipe.run.remat else (depth + 1) * block
    total += 3 * FLOAT32_BYTES * min(rows * T * n["V"] // m, LOGITS_PER_CHUNK)

    crops = sides * workload.rows_per_device * workload.crops_per_row
    total += s * crops * config.visual_tokenizer.tokens_per_crop * D
    vision = sides * vision_temp_bytes(inference)
    if workload.trains_vision:
        layers = config.vision
        if recipe.run.remat:
            saved = s * crops * layers.num_patches * layers.width
        else:
            saved = vision
        vision = 2 * vision + layers.depth * saved
    total += vision

    if s < FLOAT32_BYTES and recipe.lora is None:
        total += _kept_bytes(_with_one_row(workload))[0] * s // FLOAT32_BYTES
    if data > 1 and "data" in {axis for letter, axis in workload.rules.items() if letter != "B"}:
        block_size = 2 * (n["N"] + n["K"]) * n["H"] * D + 3 * D * n["F"]
        trains_embedding = recipe.lora is None and "llm" in recipe.trainable
        per_embedding = s + FLOAT32_BYTES * trains_embedding
        total += (2 * s * block_size + per_embedding * n["V"] * D) // m
    return total + COMPILER_RESERVED_BYTES


def _forward_workload(workload: TrainingWorkload) -> Workload:
    """Return the forward pass as a workload of inference."""
    recipe = workload.recipe
    return Workload(
        workload.config,
        workload.topology,
        workload.mesh_sizes,
        recipe.data.micro_batch_size,
        workload.length,
        images_per_row=workload.crops_per_row,
        max_partition=1,
        dtype=recipe.training.compute_dtype,
        quantization=recipe.quantization,
    )
