"""A tokenizer for models with random weights, which have none of their own."""

from ovis_jax import LoadedOvis, Ovis, Processor
from ovis_jax.inputs.image_processing import ImageProcessorConfig
from ovis_jax.inputs.tokenizer import Tokenizer
from ovis_jax.model.ovis import Params


def with_placeholder_tokenizer(model: Ovis, params: Params) -> LoadedOvis:
    """Return a model with random weights as an engine needs it; every token has the same text."""
    config = model.config
    tokenizer = Tokenizer(["a"] * config.decoder.vocab_size, {}, (), lambda text: [])
    half = (0.5, 0.5, 0.5)
    image_config = ImageProcessorConfig(config.vision.image_size, half, half, 1 / 255)
    return LoadedOvis(config, model, params, Processor(config, tokenizer, image_config))
