"""A model of VLMEvalKit, with the prompts of its own class for Ovis1.6-Gemma2-9B.

VLMEvalKit lists its models in `vlmeval.config.supported_VLM`; add this one there:

    supported_VLM["ovis-jax"] = partial(OvisJax, model_path="checkpoints/ovis1.6-gemma2-9b")
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vlmeval.dataset import DATASET_TYPE  # pyright: ignore[reportMissingImports]
from vlmeval.vlm.base import BaseModel  # pyright: ignore[reportMissingImports]

from ovis_jax.errors import RequestError
from ovis_jax.evaluation.published import LETTERS, published
from ovis_jax.evaluation.requests import Request, answers
from ovis_jax.inputs.conversation import IMAGE_TEXT
from ovis_jax.inputs.image import open_image
from ovis_jax.loading import load

Message = Sequence[Mapping[str, str]]
"""`{"type": "text" | "image", "value": TEXT or PATH}`, in order."""


class OvisJax(BaseModel):
    """Ovis in JAX as VLMEvalKit sees it; greedy.

    Args:
      model_path: as for `ovis_jax.load`.
      max_new_tokens: the longest answer; None for the published setting.
      max_partition: the most cells of an image; None for the published setting.
      dtype: compute in this dtype, not as stored.
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
        settings = published().settings
        self._ovis = load(model_path, dtype=dtype)
        self._max_new_tokens = max_new_tokens or settings["max_new_tokens"]
        self._max_partition = max_partition or settings["max_partition"]

    def use_custom_prompt(self, dataset: str) -> bool:
        """Whether `build_prompt` makes the prompts of a data set."""
        return DATASET_TYPE(dataset) in ("Y/N", "MCQ")

    def build_prompt(self, line: Any, dataset: str) -> Message:
        """The published prompt of a row: its text, then its pictures, written to files."""
        options = {x: line[x] for x in LETTERS if x in line and _is_there(line[x])}
        hint = line["hint"] if "hint" in line and _is_there(line["hint"]) else ""
        if DATASET_TYPE(dataset) == "Y/N":
            text = published().ask_yes_no(line["question"])
        elif options:
            text = published().ask_choice(line["question"], options, hint)
        else:
            text = published().ask_open(line["question"], hint)
        paths = self.dump_image(line, dataset)
        message = [{"type": "text", "value": text}]
        message += [{"type": "image", "value": path} for path in paths]
        if dataset.startswith("MMMU_"):  # pictures stand within these texts
            from vlmeval.dataset import MMMUDataset  # pyright: ignore[reportMissingImports]

            return MMMUDataset.split_MMMU(message)
        return message

    def generate_inner(self, message: Message, dataset: str | None = None) -> str:
        """Answer a message."""
        request = to_request(message)
        return answers(
            self._ovis,
            [request],
            batch=1,
            max_new_tokens=self._max_new_tokens,
            max_partition=self._max_partition,
        )[0]


def to_request(message: Message) -> Request:
    """One text with "<image>" where a picture stands; a single one stands before a single text.

    Raises:
      RequestError: the message holds something else, such as a video.
      ImageError: a picture cannot be read.
    """
    kinds = [item["type"] for item in message]
    for kind in kinds:
        if kind not in ("text", "image"):
            raise RequestError(f"a message holds {kind!r}, expected text and image alone")
    paths = [item["value"] for item in message if item["type"] == "image"]
    parts = [
        IMAGE_TEXT if item["type"] == "image" else item["value"].replace(IMAGE_TEXT, "")
        for item in message
    ]
    if sorted(kinds) == ["image", "text"]:
        parts.sort(key=lambda part: part != IMAGE_TEXT)
    return Request("\n".join(parts), [open_image(path) for path in paths])


def _is_there(value: Any) -> bool:
    """Whether a cell of a table holds something: what is missing is not equal to itself."""
    return value is not None and value == value
