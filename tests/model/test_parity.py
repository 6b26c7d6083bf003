"""Every module against PyTorch: float32, random weights, random inputs, several configs.

Errors are the largest difference over the largest value of the reference output.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import Array
from measured import record
from reference.ovis_torch import OvisTorch, params_of
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2RMSNorm,
    Gemma2RotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from ovis_jax import presets
from ovis_jax.config import OvisConfig
from ovis_jax.inputs.batch import Inputs
from ovis_jax.model import decoder, vision
from ovis_jax.model.layers import (
    apply_rope,
    gelu,
    layer_norm,
    rms_norm,
    rope_frequencies,
    softcap,
)
from ovis_jax.model.ovis import Ovis, Params
from ovis_jax.model.visual_tokenizer import VisualTokenizer, embed_words, merge_patches

pytestmark = [pytest.mark.torch, pytest.mark.optimized]

MODULE_TOLERANCE = 1e-5
STACK_TOLERANCE = 1e-4


def variant(vision: dict[str, Any], tokenizer: dict[str, Any], llm: dict[str, Any]) -> OvisConfig:
    """The tiny preset with other sizes."""
    tiny = presets.tiny()
    encoder = replace(tiny.vision, **vision)
    return replace(
        tiny,
        visual_tokenizer=replace(tiny.visual_tokenizer, vision=encoder, **tokenizer),
        decoder=replace(tiny.decoder, **llm),
    )


# Large values of norm_eps reveal a norm with another epsilon, low caps a missing cap.
CONFIGS = {
    # 5 x 5 patches merged by 2; 4 query and 2 key heads of 16 = width 64; query scalar 24.
    "tiny": presets.tiny(),
    # One key head per query head; 5 x 5 patches of an image 6 pixels larger, merged by 3.
    "equal heads": variant(
        {"image_size": 76, "norm_eps": 0.02},
        {"hidden_stride": 3, "vocab_size": 37},
        {"num_kv_heads": 4, "sliding_window": 7, "norm_eps": 0.05},
    ),
    # Heads of 8 make 48, not 60; 4 x 4 patches merged by 2; separate output embeddings.
    "narrow heads": variant(
        {"image_size": 56, "num_heads": 3, "num_channels": 1},
        {"vocab_size": 101},
        {"width": 60, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8, "tie_embeddings": False}
        | {"query_pre_attn_scalar": 7, "sliding_window": 3},
    ),
    # Heads of 32 make 128, not 48; 3 x 3 patches, none merged; low caps, other rotary base.
    "wide heads": variant(
        {"image_size": 50, "patch_size": 16, "width": 40, "depth": 3},
        {"hidden_stride": 1, "vocab_size": 30},
        {"width": 48, "num_kv_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32, "depth": 5}
        | {"attn_softcap": 5.0, "final_softcap": 12.0, "rope_theta": 500.0, "sliding_window": 11},
    ),
    # Heads of 16 make 96, not 48; no caps, windows or scaling of embeddings.
    "llama": replace(
        presets.tiny_llama(), decoder=replace(presets.tiny_llama().decoder, norm_eps=0.05)
    ),
}
LENGTH = 23
"""Positions per row, more than any window above."""


def normal(*shape: int, scale: float = 1.0) -> Array:
    """Random inputs, the same for the same shape."""
    rng = np.random.default_rng(shape)
    return jnp.array((scale * rng.standard_normal(shape)).astype(np.float32))


def count(rows: int, length: int) -> Array:
    """Positions [rows, length] from 0."""
    return jnp.broadcast_to(jnp.arange(length), (rows, length))


def tensor(x: Array | np.ndarray) -> Tensor:
    return torch.tensor(np.asarray(x))


def nchw(pixels: Array | np.ndarray) -> np.ndarray:
    return np.asarray(pixels.transpose(0, 3, 1, 2))


@dataclass(frozen=True)
class Sides:
    """The same weights in both implementations."""

    config: OvisConfig
    torch: OvisTorch
    params: Params

    def patches(self) -> Array:
        """Input of a SigLIP module."""
        return normal(2, self.config.vision.num_patches, self.config.vision.width)

    def rows(self) -> Array:
        """Input of a decoder module."""
        return normal(2, LENGTH, self.config.decoder.width, scale=2.0)

    def pixels(self) -> Array:
        """Crops [I, h, w, C]."""
        side, C = self.config.vision.image_size, self.config.vision.num_channels
        return normal(3, side, side, C)


@cache
def sides(name: str) -> Sides:
    config = CONFIGS[name]
    reference = OvisTorch.random(config, seed=sorted(CONFIGS).index(name))
    return Sides(config, reference, params_of(reference, config))


@pytest.fixture(params=CONFIGS)
def both(request: pytest.FixtureRequest) -> Sides:
    return sides(request.param)


def relative_error(got: Any, expected: Any) -> float:
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype == np.float32
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def check(got: Any, expected: Any, tolerance: float, what: str = "output") -> None:
    error = relative_error(got, expected)
    record(what, error, tolerance)
    assert error <= tolerance, f"{what}: relative error {error:.2e}, tolerance {tolerance:.0e}"


# ----- layers


def random_norm(module: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.requires_grad_(False).parameters():
        parameter.normal_(0.5, 0.5, generator=generator)
    return module


@pytest.mark.parametrize("scale", [1e-3, 3.0, 300.0])
@pytest.mark.parametrize("width", [64, 3584, 4608])
def test_rms_norm(width: int, scale: float):
    x, norm = normal(2, 7, width, scale=scale), random_norm(Gemma2RMSNorm(width, eps=1e-6))
    check(rms_norm(x, jnp.array(norm.weight), 1e-6), norm(tensor(x)), MODULE_TOLERANCE)
    norm = random_norm(LlamaRMSNorm(width, eps=1e-5))
    got = rms_norm(x, jnp.array(norm.weight), 1e-5, offset=0)
    check(got, norm(tensor(x)), MODULE_TOLERANCE)


@pytest.mark.parametrize("scale", [1e-3, 3.0, 300.0])
@pytest.mark.parametrize(("width", "eps"), [(64, 1e-5), (1152, 1e-6), (65531, 1e-5)])
def test_layer_norm(width: int, eps: float, scale: float):
    x, norm = normal(2, 7, width, scale=scale) + scale, random_norm(nn.LayerNorm(width, eps=eps))
    got = layer_norm(x, jnp.array(norm.weight), jnp.array(norm.bias), eps)
    check(got, norm(tensor(x)), MODULE_TOLERANCE)


def test_gelu():
    x = jnp.linspace(-8, 8, 100_001)
    check(gelu(x), ACT2FN["gelu_pytorch_tanh"](tensor(x)), MODULE_TOLERANCE)


@pytest.mark.parametrize("cap", [30.0, 50.0])
def test_softcap(cap: float):
    x = jnp.linspace(-300, 300, 100_001)
    check(softcap(x, cap), torch.tanh(tensor(x) / cap) * cap, MODULE_TOLERANCE)


@pytest.mark.parametrize("head_dim", [16, 128, 256])
def test_rope(head_dim: int):
    """At Gemma2's base. At other bases PyTorch's powers can be off by the last bit.

    At position 8191 that is an error of 5e-5 (base 500, heads of 256), while ours is exact.
    """
    positions = jnp.array([range(0, 8192, 63), range(8191, 0, -63)])
    q, k = (normal(*positions.shape, heads, head_dim) for heads in (4, 2))
    config = Gemma2Config(
        head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}
    )
    cos, sin = Gemma2RotaryEmbedding(config)(tensor(q), tensor(positions))
    expected = apply_rotary_pos_emb(tensor(q), tensor(k), cos, sin, unsqueeze_dim=2)
    for x, turned in zip((q, k), expected, strict=True):
        check(apply_rope(x, positions, 10_000.0), turned, MODULE_TOLERANCE)


def test_llama_norm_rounds_before_it_multiplies():
    """The last bit of bfloat16 shows the order."""
    x, norm = normal(2, 7, 64), random_norm(LlamaRMSNorm(64, eps=1e-5)).bfloat16()
    weight = jnp.array(norm.weight.float()).astype(jnp.bfloat16)
    got = rms_norm(x.astype(jnp.bfloat16), weight, 1e-5, offset=0)
    expected = norm(tensor(x).bfloat16())
    np.testing.assert_array_equal(got.astype(jnp.float32), expected.float())


@pytest.mark.parametrize("preset", [presets.tiny_llama, presets.ovis1_6_llama3_2_3b])
def test_llama3_rope_frequencies(preset: Callable[[], OvisConfig]):
    """Kept, blended and divided frequencies; float32 powers may differ by the last bits."""
    c = preset().decoder
    config = LlamaConfig(**c.to_hf())
    expected = np.asarray(LlamaRotaryEmbedding(config).inv_freq)
    found = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
    np.testing.assert_allclose(found, expected, rtol=5e-7)
    ratios = found / rope_frequencies(c.head_dim, c.rope_theta)
    assert ratios[0] == 1 and ratios[-1] == np.float32(1 / 32)
    assert np.any((ratios < 1) & (ratios > 1.01 / 32))


# ----- modules: (sides) -> our output, PyTorch's output

Module = Callable[[Sides], tuple[Any, Any]]


def patch_embedding(both: Sides) -> tuple[Any, Any]:
    pixels = both.pixels()
    encoder = vision.VisionEncoder(replace(both.config.vision, depth=0))
    got = jax.jit(encoder.apply)({"params": both.params["vision"]}, pixels)[0]
    return got, both.torch.vision.embeddings(tensor(nchw(pixels)))


def vision_part(part: str) -> Module:
    """A module of the last SigLIP block, or the block."""

    def run(both: Sides) -> tuple[Any, Any]:
        x, block = both.patches(), both.config.vision.depth - 1
        params, layer = (
            both.params["vision"][f"block_{block}"],
            both.torch.vision.encoder.layers[-1],
        )
        build, params, module = {
            "attention": (vision.VisionAttention, params.get("attn"), layer.self_attn),
            "mlp": (vision.VisionMLP, params.get("mlp"), layer.mlp),
            "block": (vision.VisionBlock, params, layer),
        }[part]
        got = jax.jit(build(both.config.vision, jnp.float32).apply)({"params": params}, x)
        arguments = {} if part == "mlp" else {"attention_mask": None}
        expected = module(tensor(x), **arguments)
        return got, expected[0] if part == "attention" else expected

    return run


def head(both: Sides, part: str) -> tuple[Any, Any]:
    features = both.patches()
    tokenizer = VisualTokenizer(both.config.visual_tokenizer)
    ours = merge_patches(features, both.config.visual_tokenizer.hidden_stride)
    got = jax.jit(tokenizer.apply)({"params": both.params["visual_tokenizer"]}, ours)
    merged = both.torch.merge(torch.tensor(features))
    logits = both.torch.head(merged)
    probabilities = logits.softmax(-1)
    expected = {"features": merged, "logits": logits, "probabilities": probabilities}
    return getattr(got, part), expected[part]


def visual_embedding(both: Sides) -> tuple[Any, Any]:
    words = both.config.visual_tokenizer.num_words
    probabilities = tensor(normal(3, 7, words)).softmax(-1)
    table = both.torch.table.weight
    got = embed_words(jnp.array(probabilities), both.params["visual_embedding"])
    return got, nn.functional.pad(probabilities, (0, 5)) @ table


def decoder_part(part: str, index: int) -> Module:
    """A module of a decoder block, or the block; Gemma2's blocks 0, 2, ... are local."""

    def run(both: Sides) -> tuple[Any, Any]:
        c, x, model = both.config.decoder, both.rows(), both.torch.llm.model
        positions = count(*x.shape[:2])
        params: Params = both.params["decoder"][f"block_{index}"]
        layer: Any = model.layers[index]
        if part == "mlp":
            got = jax.jit(decoder.GatedMLP(c, jnp.float32).apply)({"params": params["mlp"]}, x)
            return got, layer.mlp(tensor(x))
        build, params, module = {
            "attention": (decoder.DecoderAttention, params["attn"], layer.self_attn),
            "block": (decoder.DecoderBlock, params, layer),
        }[part]
        ours = build(c, c.window(index), jnp.float32)
        got, _ = jax.jit(ours.apply)({"params": params}, x, positions, None)
        window = c.window(index)
        make_mask = create_causal_mask if window is None else create_sliding_window_causal_mask
        # The fourth argument is the cache, whose name differs between versions.
        mask = make_mask(model.config, tensor(x), None, None)
        angles = model.rotary_emb(tensor(x), tensor(positions))
        expected = module(tensor(x), position_embeddings=angles, attention_mask=mask)
        return got, expected[0] if part == "attention" else expected

    return run


def final_logits(both: Sides) -> tuple[Any, Any]:
    c, x = both.config.decoder, both.rows()
    model, cap = both.torch.llm, c.final_softcap
    positions = count(*x.shape[:2])
    ours = decoder.Decoder(replace(c, depth=0))
    got = jax.jit(ours.apply)({"params": both.params["decoder"]}, x, positions).logits
    logits = model.lm_head(model.model.norm(tensor(x) * both.torch.embedding_scale))
    return got, logits if cap is None else torch.tanh(logits / cap) * cap


MODULES: dict[str, Module] = {
    "SigLIP patch embedding": patch_embedding,
    "SigLIP attention": vision_part("attention"),
    "SigLIP MLP": vision_part("mlp"),
    "SigLIP block": vision_part("block"),
    "merge": lambda both: head(both, "features"),
    "visual head and LayerNorm": lambda both: head(both, "logits"),
    "visual softmax": lambda both: head(both, "probabilities"),
    "visual embedding": visual_embedding,
    "decoder attention, even block": decoder_part("attention", 2),
    "decoder attention, odd block": decoder_part("attention", 1),
    "decoder MLP": decoder_part("mlp", 1),
    "decoder block, even": decoder_part("block", 2),
    "decoder block, odd": decoder_part("block", 3),
    "final norm, logits, cap": final_logits,
}


@pytest.mark.parametrize("module", MODULES)
def test_module(module: str, both: Sides):
    got, expected = MODULES[module](both)
    check(got, expected, MODULE_TOLERANCE, module)


def test_merge_patches_is_exact(both: Sides):
    x = both.patches()
    got = merge_patches(x, both.config.visual_tokenizer.hidden_stride)
    np.testing.assert_array_equal(got, both.torch.merge(tensor(x)))


# ----- stacks


def test_vision_stack(both: Sides):
    pixels = both.pixels()
    got = jax.jit(Ovis(both.config).embed_images_with_states)(both.params, pixels)
    expected = both.torch.embed_images(nchw(pixels))
    check(np.array(got.vision), expected.vision, STACK_TOLERANCE, "vision")
    check(got.tokens.features, expected.features, STACK_TOLERANCE, "features")
    check(got.tokens.logits, expected.logits, STACK_TOLERANCE, "logits")
    check(got.tokens.probabilities, expected.probabilities, STACK_TOLERANCE, "probabilities")
    check(got.embeddings, expected.embeddings, STACK_TOLERANCE, "embeddings")


@pytest.mark.slow
def test_decoder_stack(both: Sides):
    x = normal(1, 60, both.config.decoder.width, scale=0.4)
    positions = count(1, 60)
    ours = decoder.Decoder(both.config.decoder)
    got = jax.jit(ours.apply)({"params": both.params["decoder"]}, x, positions)
    expected = both.torch.decode(np.asarray(x[0]))
    for i, (ours, theirs) in enumerate(zip(got.hidden_states, expected.blocks, strict=True)):
        check(ours[0], theirs, STACK_TOLERANCE, f"block {i}")
    check(got.logits[0], expected.logits, STACK_TOLERANCE, "logits")


def conversation(both: Sides) -> tuple[list[np.ndarray], Inputs]:
    """Two rows of text and crops, as the reference's ids and as our padded batch."""
    slots = both.config.visual_tokenizer.tokens_per_crop
    text = np.random.default_rng(0).integers(3, both.config.decoder.vocab_size, 40).tolist()
    rows = [
        [2, *text[:5], -301, -300, -302, -300, -303, -304, -300, -305, *text[5:9]],
        [2, *text[9:]],
    ]
    expanded = [[i for i in row for _ in range(slots if i == -300 else 1)] for row in rows]
    length = max(map(len, expanded)) + 2
    tokens, positions = np.zeros((2, length), np.int32), np.full((2, length), -1, np.int32)
    for b, row in enumerate(expanded):
        tokens[b, : len(row)] = row
        positions[b, : len(row)] = np.arange(len(row))
    return [np.array(row) for row in rows], Inputs(tokens, positions, np.asarray(both.pixels()))


@pytest.mark.slow
def test_complete_model(both: Sides):
    rows, inputs = conversation(both)
    logits, states = jax.jit(Ovis(both.config).forward)(both.params, inputs)
    for b, (ids, pixels) in enumerate(zip(rows, (nchw(inputs.pixels), None), strict=True)):
        real = inputs.positions[b] >= 0
        expected = both.torch.forward(ids, pixels)
        check(states.inputs_embeds[b, real], expected.inputs_embeds, STACK_TOLERANCE, "embeds")
        for i, (ours, theirs) in enumerate(
            zip(states.hidden, expected.decoder.blocks, strict=True)
        ):
            check(ours[b, real], theirs, STACK_TOLERANCE, f"row {b}, block {i}")
        check(logits[b, real], expected.decoder.logits, STACK_TOLERANCE, f"row {b}, logits")


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [pytest.param(2, marks=pytest.mark.exhaustive), 30])
def test_decoding_past_the_window(prompt: int, both: Sides):
    """With a cache, from prompts shorter and longer than the window."""
    vocab_size, steps = both.config.decoder.vocab_size, 20
    ids = np.random.default_rng(1).integers(3, vocab_size, prompt + steps).astype(np.int32)
    expected = both.torch.forward(ids, None).decoder.logits
    model = Ovis(both.config)
    no_pixels = np.asarray(both.pixels()[:0])
    inputs = Inputs(ids[None, :prompt], np.arange(prompt, dtype=np.int32)[None], no_pixels)
    prefill, decode = jax.jit(model.prefill, static_argnums=2), jax.jit(model.decode)
    logits, cache = prefill(both.params, inputs, prompt + steps)
    for i in range(prompt, prompt + steps):
        check(logits[0], expected[i - 1], STACK_TOLERANCE, f"position {i - 1}")
        logits, cache = decode(both.params, ids[None, i], cache)
    check(logits[0], expected[-1], STACK_TOLERANCE, f"position {prompt + steps - 1}")
