"""What the model saw on its way, for those who want to look."""

from typing import NamedTuple

from jax import Array
from jaxtyping import Float

from ovis_jax.model.visual_tokenizer import VisualTokens


class ImageStates(NamedTuple):
    """What the model makes of crops, stage by stage."""

    vision: tuple[Float[Array, "I P E"], ...]
    """The patch embeddings, then the output of each SigLIP block."""
    tokens: VisualTokens
    embeddings: Float[Array, "I M D"]


class States(NamedTuple):
    """What `forward` saw on its way."""

    images: ImageStates | None
    inputs_embeds: Float[Array, "B T D"]
    """Text, indicators and visual tokens in one sequence, before the scaling by sqrt(width)."""
    hidden: tuple[Float[Array, "B T D"], ...]
    """The output of each decoder block; the last one before the final norm."""
