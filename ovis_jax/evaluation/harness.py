"""What the models for lmms-eval and VLMEvalKit share: requests, answered in batches."""

from collections.abc import Sequence
from typing import NamedTuple

from jax import Array
from PIL import Image

from ovis_jax.evaluation.batch_answering import answer_one_batch, group_by_length
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.batch import Example
from ovis_jax.inputs.conversation import IMAGE_PLACEHOLDER
from ovis_jax.inputs.processor import Processor
from ovis_jax.loading import LoadedOvis


class HarnessRequest(NamedTuple):
    """A question from a harness: its text, with "<image>" at the place of each image."""

    text: str
    images: Sequence[Image.Image] = ()

    @property
    def length(self) -> tuple[int, int]:
        """The sort key of `group_by_length`."""
        return len(self.images), len(self.text)

    def encode(self, processor: Processor, max_partition: int) -> Example:
        """Encode the question, without "<image>" if their number is not that of the images.

        Raises:
          OvisError: an image cannot be processed, or the prompt is too long.
        """
        text = self.text
        if text.count(IMAGE_PLACEHOLDER) != len(self.images):
            text = text.replace(IMAGE_PLACEHOLDER, "")
        return processor.encode(text, list(self.images), max_partition=max_partition)


def answer_requests(
    ovis: LoadedOvis,
    requests: Sequence[HarnessRequest],
    *,
    batch_size: int,
    max_new_tokens: int,
    max_partition: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    key: Array | None = None,
) -> list[str]:
    """Answer requests in batches of similar length; the answers are in the order of the requests.

    Raises:
      OvisError: an image or text cannot be processed.
    """
    answers = [""] * len(requests)
    for indices in group_by_length([request.length for request in requests], batch_size):
        texts, _ = answer_one_batch(
            ovis,
            [requests[i].encode(ovis.processor, max_partition) for i in indices],
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            key=key,
        )
        for i, text in zip(indices, texts, strict=True):
            answers[i] = text.strip()
    return answers
