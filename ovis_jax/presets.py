"""Configs of the published models, of a model for benchmarks, and of a tiny model for tests."""

from typing import Any

from ovis_jax.config import DecoderConfig, OvisConfig, VisionConfig, VisualTokenizerConfig

_GEMMA2: dict[str, Any] = {
    "sliding_window": 4096,
    "attn_softcap": 50.0,
    "final_softcap": 30.0,
    "rope_theta": 10000.0,
    "norm_eps": 1e-6,
}
"""Constants of every Gemma2 decoder."""


def ovis1_6_gemma2_9b() -> OvisConfig:
    """The published AIDC-AI/Ovis1.6-Gemma2-9B, with 10.2 billion parameters."""
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
    """The published AIDC-AI/Ovis1.6-Gemma2-27B."""
    return _published(
        width=4608,
        depth=46,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        mlp_width=36864,
        query_pre_attn_scalar=144,
    )


def tiny() -> OvisConfig:
    """A model for tests, with grouped heads and an odd patch grid like the published ones."""
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


def benchmark() -> OvisConfig:
    """A model for benchmarks on small machines: the 9B's proportions in 410 million parameters.

    The vision encoder has the 9B's sizes except for its depth. Decoder width and vocabularies are
    about a quarter of the 9B's. Heads keep their size, so that attention scores and products have
    the 9B's proportion.
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
    """A published model from the sizes of its decoder."""
    return _ovis(
        VisualTokenizerConfig(_siglip(depth=27), 65536, 2, "softmax"),
        DecoderConfig(vocab_size=256000, **_GEMMA2, **decoder),
    )


def _siglip(depth: int) -> VisionConfig:
    """SigLIP so400m at 384 pixels, with `depth` blocks."""
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
