"""What the plug-ins have in common: requests of a harness, answered in batches and in order."""

from collections.abc import Sequence
from typing import NamedTuple

from jax import Array
from PIL import Image

from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.conversation import IMAGE_TEXT, Turn
from ovis_jax.loading import LoadedOvis
from ovis_jax.training.evaluation import answer_batch, like_length, turns_length


class Request(NamedTuple):
    """One question: its text, in which "<image>" may stand for each image, and the images."""

    text: str
    images: Sequence[Image.Image] = ()

    @property
    def turns(self) -> list[Turn]:
        """The text as a turn. Marks that do not go with the images are left out of it."""
        text = self.text
        if text.count(IMAGE_TEXT) != len(self.images):
            text = text.replace(IMAGE_TEXT, "")
        return [{"role": "user", "content": text}]


def answers(
    ovis: LoadedOvis,
    requests: Sequence[Request],
    *,
    batch: int,
    max_new_tokens: int,
    max_partition: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    key: Array | None = None,
) -> list[str]:
    """Answer requests; those of like length are answered together.

    Raises:
      OvisError: an image or text cannot be given to the model.
    """
    found = [""] * len(requests)
    lengths = [turns_length(request.images, request.turns) for request in requests]
    for indices in like_length(lengths, batch):
        texts, _ = answer_batch(
            *(ovis.processor, ovis.model, ovis.params),
            [requests[i].turns for i in indices],
            [requests[i].images for i in indices],
            batch=batch,
            max_new_tokens=max_new_tokens,
            max_partition=max_partition,
            sampling=sampling,
            key=key,
        )
        for i, text in zip(indices, texts, strict=True):
            found[i] = text.strip()
    return found
