"""Models with fewer blocks, which compile in less time."""

from dataclasses import replace

from ovis_jax.config import OvisConfig


def with_depth(config: OvisConfig, depth: int) -> OvisConfig:
    """Return the config of a model with at most `depth` blocks in each transformer."""
    vision = replace(config.vision, depth=min(depth, config.vision.depth))
    decoder = replace(config.decoder, depth=min(depth, config.decoder.depth))
    tokenizer = replace(config.visual_tokenizer, vision=vision)
    return replace(config, visual_tokenizer=tokenizer, decoder=decoder)
