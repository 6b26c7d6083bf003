"""A model for VLMEvalKit, with the same prompts as VLMEvalKit's class for Ovis1.6-Gemma2-9B.

Add the model to VLMEvalKit's dict of models, `vlmeval.config.supported_VLM`:

    supported_VLM["ovis-jax"] = partial(
        OvisForVLMEvalKit, model_path="checkpoints/ovis1.6-gemma2-9b"
    )
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vlmeval.dataset import DATASET_TYPE  # pyright: ignore[reportMissingImports]
from vlmeval.vlm.base import BaseModel  # pyright: ignore[reportMissingImports]

from ovis_jax.errors import RequestError
from ovis_jax.evaluation.batch_answering import EvalPrompt, answer_prompts, harness_prompt
from ovis_jax.evaluation.published_prompts_and_scores import (
    OPTION_LETTERS,
    load_published_benchmarks,
)
from ovis_jax.inputs.conversation import IMAGE_PLACEHOLDER
from ovis_jax.loading import load

Message = Sequence[Mapping[str, str]]
"""VLMEvalKit's messages: a list of `{"type": "text" | "image", "value": TEXT or PATH}`."""


class OvisForVLMEvalKit(BaseModel):
    """Ovis as a model for VLMEvalKit, with greedy decoding.

    Args:
      model_path: The checkpoint, as for `ovis_jax.load`.
      max_new_tokens: Maximum number of tokens per answer; None for the published setting.
      max_partition: Maximum number of cells that an image is split into; None for the published
        setting.
      dtype: Dtype of the computation; None for the checkpoint's dtype.
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
        """Return whether `build_prompt` builds the prompts for a dataset."""
        return DATASET_TYPE(dataset) in ("Y/N", "MCQ")

    def build_prompt(self, line: Any, dataset: str) -> Message:
        """Build the published prompt for a dataset row: the text, then the paths of the images."""
        is_yes_no = DATASET_TYPE(dataset) == "Y/N"
        names = () if is_yes_no else (*OPTION_LETTERS, "hint")
        options = {name: line[name] for name in names if name in line and _has_value(line[name])}
        hint = options.pop("hint", "")
        text = self._published.format_prompt(line["question"], hint, options, is_yes_no=is_yes_no)
        paths = self.dump_image(line, dataset)
        message = [{"type": "text", "value": text}]
        message += [{"type": "image", "value": path} for path in paths]
        if dataset.startswith("MMMU_"):  # images appear within these texts
            from vlmeval.dataset import MMMUDataset  # pyright: ignore[reportMissingImports]

            return MMMUDataset.split_MMMU(message)
        return message

    def generate_inner(self, message: Message, dataset: str | None = None) -> str:
        """Generate the answer to a message."""
        answers = answer_prompts(
            self._ovis,
            [message_to_prompt(message)],
            batch_size=1,
            max_new_tokens=self._max_new_tokens,
            max_partition=self._max_partition,
        )
        return next(answers)[1].strip()


def message_to_prompt(message: Message) -> EvalPrompt:
    """Convert a message to a prompt, in whose text "<image>" marks the place of each image.

    If the message consists of one image and one text, the image comes first.

    Raises:
      RequestError: The message contains an unsupported type of content, such as a video.
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
    return harness_prompt("\n".join(parts), paths)


def _has_value(cell: Any) -> bool:
    """Return whether a table cell is neither None nor NaN."""
    return cell is not None and cell == cell
