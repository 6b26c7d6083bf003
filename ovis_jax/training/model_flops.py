"""The model FLOPs of a training step: those of its matrix products, counted from the config.

Model FLOPs are the FLOPs that the mathematics of the step needs, as in PaLM (Chowdhery et al. 2022,
appendix B). A product that is computed again in the backward pass counts once. Padding, logits at
positions without a label, and pairs of positions that attention masks out do not count.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ovis_jax.config import OvisConfig
from ovis_jax.inputs.conversation import IGNORE_INDEX
from ovis_jax.inputs.image_processing import IMAGE_SLOT
from ovis_jax.sharding import param_shapes
from ovis_jax.training.losses import TrainBatch


class ModelWork(NamedTuple):
    """The amounts of work that FLOPs are proportional to, or the FLOPs for one unit of each.

    Attributes:
      crops: Number of crops.
      positions: Number of positions.
      targets: Number of positions whose logits are needed.
      global_pairs: Number of visible query-key pairs in a block without a sliding window.
      local_pairs: Number of visible query-key pairs in a block with a sliding window.
    """

    crops: int = 0
    positions: int = 0
    targets: int = 0
    global_pairs: int = 0
    local_pairs: int = 0

    def plus(self, other: "ModelWork") -> "ModelWork":
        """Return the sums of both."""
        return ModelWork(*(x + y for x, y in zip(self, other, strict=True)))

    def times(self, flops_per_unit: "ModelWork") -> int:
        """Return the FLOPs of this work."""
        return sum(x * y for x, y in zip(self, flops_per_unit, strict=True))


def count_work(config: OvisConfig, batch: TrainBatch) -> ModelWork:
    """Count the work in a batch, or in stacked micro-batches, without padding."""
    tokens, positions = np.asarray(batch.inputs.tokens), np.asarray(batch.inputs.positions)
    is_real = positions >= 0
    lengths = is_real.sum(axis=-1)
    window = np.minimum(lengths, config.decoder.sliding_window or np.inf).astype(int)
    num_slots = int(np.sum(is_real & (tokens == IMAGE_SLOT)))
    return ModelWork(
        crops=-(-num_slots // config.visual_tokenizer.tokens_per_crop),
        positions=int(lengths.sum()),
        targets=int(np.sum(np.asarray(batch.labels)[..., 1:] != IGNORE_INDEX)),
        global_pairs=int(np.sum(lengths * (lengths + 1) // 2)),
        local_pairs=int(np.sum(window * (window + 1) // 2 + (lengths - window) * window)),
    )


def training_flops(config: OvisConfig, trainable: Mapping[str, Sequence[int]]) -> ModelWork:
    """Return the FLOPs of a forward and a backward pass for one unit of each kind of work.

    A multiply-add counts as two FLOPs. The backward pass needs as many FLOPs as the forward pass
    for the gradient of a trainable matrix, and as many again for the gradient of the matrix's
    input, if an earlier parameter is trainable. Full fine-tuning therefore needs about 6 FLOPs per
    parameter and position, and LoRA about 4. Without trainable parameters, the result is that of a
    forward pass.

    Args:
      config: Config of the model.
      trainable: Shapes of the trainable parameters or adapters, by path.
    """
    shapes = param_shapes(config)
    flops = dict.fromkeys(ModelWork._fields, 0)
    input_gradient = False  # whether an earlier parameter is trainable
    for stage in _stages(config):
        flops[stage.unit] += 4 * stage.count * stage.attention_width * (1 + 2 * input_gradient)
        is_trained = False
        for path in stage.paths:
            products = 1 + input_gradient + (path in trainable)
            numbers = products * math.prod(shapes[path])
            if lora_a := trainable.get(f"{path}/lora_a"):
                numbers += (2 + input_gradient) * math.prod(lora_a)
                numbers += 3 * math.prod(trainable[f"{path}/lora_b"])
            flops[stage.unit] += 2 * stage.count * numbers
            is_trained |= path in trainable or lora_a is not None
        input_gradient |= is_trained
    return ModelWork(**flops)


class _Stage(NamedTuple):
    """An attention, or matrices that are multiplied by the same input.

    Attributes:
      unit: The kind of work, a field of `ModelWork`.
      count: Number of rows or of query-key pairs in one unit.
      paths: Paths of the matrices.
      attention_width: For an attention, the width of all queries together.
    """

    unit: str
    count: int
    paths: tuple[str, ...] = ()
    attention_width: int = 0


def _stages(config: OvisConfig) -> Iterator[_Stage]:
    """Yield everything that multiplies, in the order of the forward pass."""
    vision, decoder, M = config.vision, config.decoder, config.visual_tokenizer.tokens_per_crop
    P = vision.num_patches
    yield _Stage("crops", P, ("vision/patch",))
    for i in range(vision.depth):
        block = f"vision/block_{i}"
        yield _Stage("crops", P, tuple(f"{block}/attn/{name}" for name in "qkv"))
        yield _Stage("crops", P * P, attention_width=vision.width)
        yield _Stage("crops", P, (f"{block}/attn/o",))
        yield _Stage("crops", P, (f"{block}/mlp/up",))
        yield _Stage("crops", P, (f"{block}/mlp/down",))
    yield _Stage("crops", M, ("visual_tokenizer/head",))
    yield _Stage("crops", M, ("visual_embedding",))
    yield _Stage("positions", 0, ("decoder/embed",))  # a lookup
    for i in range(decoder.depth):
        block = f"decoder/block_{i}"
        pairs = "global_pairs" if decoder.window(i) is None else "local_pairs"
        yield _Stage("positions", 1, tuple(f"{block}/attn/{name}" for name in "qkv"))
        yield _Stage(pairs, 1, attention_width=decoder.num_heads * decoder.head_dim)
        yield _Stage("positions", 1, (f"{block}/attn/o",))
        yield _Stage("positions", 1, (f"{block}/mlp/gate", f"{block}/mlp/up"))
        yield _Stage("positions", 1, (f"{block}/mlp/down",))
    output = "decoder/embed" if decoder.tie_embeddings else "decoder/unembed"
    yield _Stage("targets", 1, (output,))
