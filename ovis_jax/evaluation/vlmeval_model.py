"""A model for VLMEvalKit, with the prompts of its own class for Ovis1.6-Gemma2-9B.

Add it to VLMEvalKit's list of models, `vlmeval.config.supported_VLM`:

    supported_VLM["ovis-jax"] = partial(
        OvisForVLMEvalKit, model_path="checkpoints/ovis1.6-gemma2-9b"
    )
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vlmeval.dataset import DATASET_TYPE  # pyright: ignore[reportMissingImports]
from vlmeval.vlm.base import BaseModel  # pyright: ignore[reportMissingImports]

from ovis_jax.errors import RequestError
from ovis_jax.evaluation.harness import HarnessRequest, answer_requests
from ovis_jax.evaluation.published_prompts_and_scores import (
    OPTION_LETTERS,
    load_published_benchmarks,
)
from ovis_jax.inputs.conversation import IMAGE_PLACEHOLDER
from ovis_jax.inputs.open_image import open_image
from ovis_jax.loading import load

Message = Sequence[Mapping[str, str]]
"""VLMEvalKit's message: `{"type": "text" | "image", "value": TEXT or PATH}` in order."""


class OvisForVLMEvalKit(BaseModel):
    """Ovis as a VLMEvalKit model, with greedy decoding.

    Args:
      model_path: checkpoint, as for `ovis_jax.load`.
      max_new_tokens: maximum number of tokens per answer; None for the published setting.
      max_partition: maximum number of cells that an image is split into; None for the published
        setting.
      dtype: dtype of the computation; None for that of the checkpoint.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self,
        model_path: str = "ovis-tiny",
        *,
        max_new_tokens: int | None = None,
        max_partition: int | None = None,
        dtype: str | None = None,
    ):
        super().__init__()
        self._published = load_published_benchmarks()
        settings = self._published.settings
        self._ovis = load(model_path, dtype=dtype)
        self._max_new_tokens = max_new_tokens or settings["max_new_tokens"]
        self._max_partition = max_partition or settings["max_partition"]

    def use_custom_prompt(self, dataset: str) -> bool:
        """Return whether `build_prompt` builds the prompts of a dataset."""
        return DATASET_TYPE(dataset) in ("Y/N", "MCQ")

    def build_prompt(self, line: Any, dataset: str) -> Message:
        """Build the published prompt of a row: its text, then its images as files."""
        options = {x: line[x] for x in OPTION_LETTERS if x in line and _has_value(line[x])}
        hint = line["hint"] if "hint" in line and _has_value(line["hint"]) else ""
        if DATASET_TYPE(dataset) == "Y/N":
            text = self._published.yes_no_prompt(line["question"])
        elif options:
            text = self._published.multiple_choice_prompt(line["question"], options, hint)
        else:
            text = self._published.open_prompt(line["question"], hint)
        paths = self.dump_image(line, dataset)
        message = [{"type": "text", "value": text}]
        message += [{"type": "image", "value": path} for path in paths]
        if dataset.startswith("MMMU_"):  # images appear within these texts
            from vlmeval.dataset import MMMUDataset  # pyright: ignore[reportMissingImports]

            return MMMUDataset.split_MMMU(message)
        return message

    def generate_inner(self, message: Message, dataset: str | None = None) -> str:
        """Answer a message."""
        return answer_requests(
            self._ovis,
            [message_to_request(message)],
            batch_size=1,
            max_new_tokens=self._max_new_tokens,
            max_partition=self._max_partition,
        )[0]


def message_to_request(message: Message) -> HarnessRequest:
    """Join a message to one text with "<image>" for each image.

    If the message is one image and one text, the image comes first.

    Raises:
      RequestError: the message has another type of content, such as a video.
      ImageError: an image cannot be read.
    """
    types = [item["type"] for item in message]
    for content_type in types:
        if content_type not in ("text", "image"):
            raise RequestError(
                f"a message has content of type {content_type!r}, expected 'text' or 'image'"
            )
    paths = [item["value"] for item in message if item["type"] == "image"]
    parts = [
        IMAGE_PLACEHOLDER
        if item["type"] == "image"
        else item["value"].replace(IMAGE_PLACEHOLDER, "")
        for item in message
    ]
    if sorted(types) == ["image", "text"]:
        parts.sort(key=lambda part: part != IMAGE_PLACEHOLDER)
    return HarnessRequest("\n".join(parts), [open_image(path) for path in paths])


def _has_value(cell: Any) -> bool:
    """Return whether a table cell is neither None nor NaN."""
    return cell is not None and cell == cell
