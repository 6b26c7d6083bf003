"""Configs of the published models, of a model for benchmarks, and of tiny models for tests."""

from typing import Any

from ovis_jax.config import (
    LLAMA_FIELDS,
    DecoderConfig,
    OvisConfig,
    RopeScaling,
    VisionConfig,
    VisualTokenizerConfig,
)

_GEMMA2: dict[str, Any] = {
    "sliding_window": 4096,
    "attn_softcap": 50.0,
    "final_softcap": 30.0,
    "rope_theta": 10000.0,
    "norm_eps": 1e-6,
}
"""Constants that all Gemma2 decoders share."""


def ovis1_6_gemma2_9b() -> OvisConfig:
    """Return the config of AIDC-AI/Ovis1.6-Gemma2-9B, which has 10.2 billion parameters."""
    return _published(
        width=3584,
        depth=42,
        num_heads=16,
        num_kv_heads=8,
        head_dim=256,
        mlp_width=14336,
        query_pre_attn_scalar=256,
    )


def ovis1_6_gemma2_27b() -> OvisConfig:
    """Return the config of AIDC-AI/Ovis1.6-Gemma2-27B."""
    return _published(
        width=4608,
        depth=46,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        mlp_width=36864,
        query_pre_attn_scalar=144,
    )


def ovis1_6_llama3_2_3b() -> OvisConfig:
    """Return the config of AIDC-AI/Ovis1.6-Llama3.2-3B, which has 4.1 billion parameters."""
    decoder = DecoderConfig(
        vocab_size=128256,
        width=3072,
        depth=28,
        num_heads=24,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=8192,
        query_pre_attn_scalar=128,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        norm_eps=1e-5,
        **LLAMA_FIELDS,
    )
    return OvisConfig(
        VisualTokenizerConfig(_siglip(depth=27), 65536, 2, "softmax"),
        decoder,
        multimodal_max_length=8192,
        eos_ids=(128001, 128008, 128009),
        bos_id=128000,
        pad_id=128001,
    )


def tiny() -> OvisConfig:
    """Return the config of a tiny model for tests."""
    vision = VisionConfig(
        width=48,
        depth=2,
        num_heads=4,
        mlp_width=64,
        image_size=70,
        patch_size=14,
        num_channels=3,
        norm_eps=1e-6,
    )
    decoder = DecoderConfig(
        vocab_size=600,
        width=64,
        depth=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_width=128,
        sliding_window=16,
        query_pre_attn_scalar=24,
        attn_softcap=50.0,
        final_softcap=30.0,
        rope_theta=10000.0,
        norm_eps=1e-6,
    )
    return _ovis(VisualTokenizerConfig(vision, 69, 2, "softmax"), decoder)


def tiny_llama() -> OvisConfig:
    """Return the config of a tiny model with a Llama decoder for tests."""
    decoder = DecoderConfig(
        vocab_size=512,
        width=48,
        depth=4,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        mlp_width=96,
        query_pre_attn_scalar=16,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 64),
        norm_eps=1e-5,
        **LLAMA_FIELDS,
    )
    return OvisConfig(
        tiny().visual_tokenizer,
        decoder,
        multimodal_max_length=8192,
        eos_ids=(481, 488, 489),
        bos_id=480,
        pad_id=481,
    )


def benchmark() -> OvisConfig:
    """Return the config of a model for benchmarks on small machines, with 410 million parameters.

    The model has the proportions of the 9B. The vision encoder has the same sizes as in the 9B,
    except for the depth. The decoder's width and the vocabularies are about a quarter of the 9B's.
    The heads have the same size as in the 9B, so the ratio between the work for attention scores
    and that for matrix products is also the same.
    """
    decoder = DecoderConfig(
        vocab_size=64000,
        width=1024,
        depth=12,
        num_heads=4,
        num_kv_heads=2,
        head_dim=256,
        mlp_width=4096,
        query_pre_attn_scalar=256,
        **_GEMMA2,
    )
    return _ovis(VisualTokenizerConfig(_siglip(depth=4), 16384, 2, "softmax"), decoder)


def _published(**decoder: Any) -> OvisConfig:
    """Return the config of a published model with Gemma2, given the sizes of the decoder."""
    return _ovis(
        VisualTokenizerConfig(_siglip(depth=27), 65536, 2, "softmax"),
        DecoderConfig(vocab_size=256000, **_GEMMA2, **decoder),
    )


def _siglip(depth: int) -> VisionConfig:
    """Return the config of SigLIP so400m for 384 pixels, with `depth` blocks."""
    return VisionConfig(
        width=1152,
        depth=depth,
        num_heads=16,
        mlp_width=4304,
        image_size=384,
        patch_size=14,
        num_channels=3,
        norm_eps=1e-6,
    )


def _ovis(visual_tokenizer: VisualTokenizerConfig, decoder: DecoderConfig) -> OvisConfig:
    return OvisConfig(
        visual_tokenizer, decoder, multimodal_max_length=8192, eos_ids=(1, 107), bos_id=2, pad_id=0
    )
