"""Model FLOPs, compared with XLA's count of a compiled gradient and with counts by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovis_jax.config import OvisConfig
from ovis_jax.inputs.batch import Inputs
from ovis_jax.inputs.image_processing import IMAGE_SLOT
from ovis_jax.model.lora import init_adapters
from ovis_jax.model.ovis import Ovis
from ovis_jax.presets import ovis1_6_gemma2_9b
from ovis_jax.training.config import StepConfig
from ovis_jax.training.losses import TrainBatch
from ovis_jax.training.model_flops import ModelWork, count_work, training_flops
from ovis_jax.training.train_step import accumulate_gradients, init_gradient_sums, init_train_state
from ovis_jax.training.trainable import TRAINABLE_PARTS, split_params


@pytest.fixture(scope="module")
def config(shallow_checkpoint) -> OvisConfig:
    """Widths at which matrix products have most FLOPs, and lengths at which attention has few."""
    small = OvisConfig.from_folder(shallow_checkpoint)
    vision = replace(
        small.vision, width=128, depth=2, num_heads=2, mlp_width=256, image_size=28, patch_size=14
    )
    tokenizer = replace(small.visual_tokenizer, vision=vision, vocab_size=517)
    decoder = replace(
        small.decoder,
        vocab_size=512,
        width=256,
        depth=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_width=512,
    )
    return replace(small, visual_tokenizer=tokenizer, decoder=decoder)


def make_batch(config: OvisConfig, lengths: list[int], length: int, crops: int) -> TrainBatch:
    """Stacked micro-batch whose first row begins with all visual tokens."""
    positions = np.where(np.arange(length) < np.array(lengths)[:, None], np.arange(length), -1)
    tokens = np.ones((len(lengths), length), np.int32)
    tokens[0, : crops * config.visual_tokenizer.tokens_per_crop] = IMAGE_SLOT
    labels = np.where(positions > 0, 1, -100).astype(np.int32)
    side = config.vision.image_size
    pixels = np.zeros((crops, side, side, 3), np.float32)
    inputs = Inputs(tokens[None], positions.astype(np.int32)[None], pixels[None])
    return TrainBatch(inputs, labels[None])


@pytest.mark.parametrize("part", ["llm", "visual_embedding", "visual_tokenizer", "all", "lora"])
def test_flops_agree_with_xla(config, part):
    batch = make_batch(config, [8, 8, 8, 8], 8, crops=4)
    model = Ovis(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    if part == "lora":
        pattern = r"decoder/.*/(attn|mlp)/.*"
        trainable = init_adapters(params, jax.random.key(0), rank=4, target_modules=pattern)
        frozen = split_params(params, TRAINABLE_PARTS)[0]
    else:
        parts = TRAINABLE_PARTS if part == "all" else [part]
        trainable, frozen = split_params(params, parts)
    step = StepConfig(max_steps=1)
    sums = init_gradient_sums(init_train_state(step, trainable))
    lowered = accumulate_gradients.lower(model, step, trainable, frozen, sums, batch)
    counted = lowered.compile().cost_analysis()["flops"]

    flops = training_flops(config, {path: x.shape for path, x in trainable.items()})
    work = count_work(config, batch)
    # XLA also computes hidden pairs, and logits at the last position, which has no label.
    computed = work._replace(targets=32, global_pairs=4 * 64, local_pairs=4 * 64)
    assert 0.97 < computed.times(flops) / counted < 1  # XLA also counts other operations


def test_work_without_padding(config):
    config = replace(config, decoder=replace(config.decoder, sliding_window=3))
    batch = make_batch(config, [5, 2, 0], 6, crops=2)
    assert count_work(config, batch) == ModelWork(
        crops=2,
        positions=7,
        targets=5,
        global_pairs=15 + 3,
        local_pairs=1 + 2 + 3 + 3 + 3 + 1 + 2,
    )


def test_multiples_of_the_forward_pass():
    config = ovis1_6_gemma2_9b()
    forward = training_flops(config, {})
    decoder = {path: (1,) for path in ("decoder/embed", *matrices(config))}
    full = training_flops(config, decoder)
    assert full.positions == 3 * forward.positions and full.targets == 3 * forward.targets
    assert full.global_pairs == 3 * forward.global_pairs and full.crops == forward.crops
    # Rank 0 on every matrix of the decoder: no input gradient in the first attention.
    adapters = {f"{path}/lora_{x}": (0, 0) for path in matrices(config) for x in "ab"}
    lora = training_flops(config, adapters)
    assert 1.98 < lora.positions / forward.positions < 2


def matrices(config: OvisConfig) -> list[str]:
    names = "attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down"
    return [f"decoder/block_{i}/{name}" for i in range(config.decoder.depth) for name in names]
