"""Prompts and images become the arrays that the model reads; ids become text again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from ovis_jax.config import NUM_IMAGE_INDICATORS, OvisConfig
from ovis_jax.errors import ConfigError, ImageError, PromptError, PromptTooLong
from ovis_jax.inputs.batch import (
    Example,
    Inputs,
    as_rows,
    first_positions,
    last_positions,
    pad_batch,
)
from ovis_jax.inputs.buckets import Bucket
from ovis_jax.inputs.conversation import (
    IGNORED,
    Formatted,
    Prompt,
    Turn,
    format_conversation,
    format_prompt,
    place_images,
    read_turns,
)
from ovis_jax.inputs.image import (
    IMAGE_SLOT,
    Images,
    ImageSettings,
    choose_grid,
    count_images,
    crops,
    placeholders,
)
from ovis_jax.inputs.tokenizer import TextStream, Tokenizer

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Processor:
    """What stands between the user's text and images and the model's arrays."""

    config: OvisConfig
    tokenizer: Tokenizer
    image_settings: ImageSettings
    buckets: tuple[Bucket, ...] = ()  # that batches are padded to; none: inputs/buckets.py's ladder

    @classmethod
    def from_folder(cls, folder: Path, config: OvisConfig) -> Self:
        """Read the tokenizer and preprocessor_config.json of a checkpoint folder.

        Raises:
          ConfigError: a file is missing, is not supported, or does not go with `config`.
        """
        if config.vision.num_channels != 3:
            raise ConfigError(
                f"config.json: num_channels is {config.vision.num_channels}, expected 3: "
                "images are read as red, green and blue"
            )
        tokenizer = Tokenizer.from_folder(folder)
        if len(tokenizer.pieces) > config.decoder.vocab_size:
            raise ConfigError(
                f"{folder}: the tokenizer has {len(tokenizer.pieces)} pieces, more than vocab_size "
                f"{config.decoder.vocab_size} of config.json; use the tokenizer of this checkpoint"
            )
        for piece, i in [("<bos>", config.bos_id), ("<pad>", config.pad_id)]:
            if tokenizer.id_of(piece) != i:
                raise ConfigError(
                    f"{folder}: the tokenizer gives {piece} the id {tokenizer.id_of(piece)}, but "
                    f"generation_config.json gives it {i}; use the tokenizer of this checkpoint"
                )
        return cls(config, tokenizer, ImageSettings.from_folder(folder, config.vision.image_size))

    def __call__(
        self,
        prompts: Sequence[Prompt],
        images: Sequence[Images] | None = None,
        *,
        max_partition: int | Sequence[int] = 9,
        preface: str | Sequence[str] = "",
        truncate: bool = False,
        control: bool = True,
    ) -> Inputs:
        """Make a batch of prompts that the model is to answer.

        Args:
          prompts: B prompts, each a string or a list of turns
            `{"role": "user" | "assistant", "content": str}`. An image stands where "<image>" is
            written; without any, the images stand first.
          images: one list of PIL images a prompt.
          max_partition: the most cells an image is cut into; one number, or one a prompt.
          preface: how the answer begins; one text, or one a prompt.
          truncate: cut prompts that are too long: their last positions are kept, so the first
            images and the beginning of the text go.
          control: whether control marks such as "<eos>" in a text become control ids, as in the
            original. Say False for text of people you do not trust.

        Raises:
          PromptError: a prompt is empty, malformed, or does not go with its images.
          PromptTooLong: a prompt is too long, and is not to be cut.
          ImageError: an image cannot be decoded or cut into crops.
          RequestError: none of the processor's `buckets` holds the batch.
        """
        if isinstance(prompts, str) or not prompts:
            raise PromptError("prompts must be a list of at least one prompt")
        batch = len(prompts)
        image_lists = [()] * batch if images is None else images
        one = np.ndim(max_partition) == 0
        partitions = cast(Sequence[int], [max_partition] * batch if one else max_partition)
        prefaces = [preface] * batch if isinstance(preface, str) else preface
        arguments = zip(
            prompts,
            _one_each(image_lists, batch, "images"),
            _one_each(partitions, batch, "max_partition"),
            _one_each(prefaces, batch, "preface"),
            strict=True,
        )
        examples: list[Example] = []
        keep = "last" if truncate else "all"
        for number, (prompt, row_images, partition, beginning) in enumerate(arguments):
            name = f"prompts[{number}]"
            turns = read_turns(prompt, count_images(row_images, name), name)
            formatted = format_prompt(turns, self.tokenizer, beginning, control=control, name=name)
            examples.append(self._example(formatted, row_images, partition, name, keep))
        pixels = np.concatenate([example.pixels for example in examples])
        return pad_batch([e.tokens for e in examples], pixels, self.config, self.buckets)

    def training_example(
        self,
        turns: Sequence[Turn],
        images: Images = (),
        *,
        max_partition: int = 9,
        max_length: int | None = None,
        truncate: bool = False,
        control: bool = True,
    ) -> Example:
        """Make an example of a conversation whose assistant turns are learned.

        Args:
          turns: the conversation.
          images: in order of appearance.
          max_partition: the most cells an image is cut into.
          max_length: the longest example, in positions; None for the model's own limit.
          truncate: cut a conversation that is too long: its first positions are kept, so the last
            answers go.
          control: see `__call__`.

        Raises:
          PromptError: the conversation is malformed, too long, without an assistant turn, or does
            not go with its images; or cutting it would cut an image or leave no answer.
          ImageError: an image cannot be decoded or cut into crops.
        """
        name = "the conversation"
        turns = read_turns(turns, count_images(images, name), name)
        formatted = format_conversation(turns, self.tokenizer, control=control)
        if all(label == IGNORED for label in formatted.labels):
            raise PromptError(f"{name} has no assistant turn, so nothing could be learned from it")
        keep = "first" if truncate else "all"
        return self._example(formatted, images, max_partition, name, keep, max_length)

    def from_reference(
        self,
        input_ids: Sequence[ArrayLike] | np.ndarray,
        pixel_values: ArrayLike | None = None,
        attention_mask: Sequence[ArrayLike] | np.ndarray | None = None,
    ) -> Inputs:
        """Make a batch of the original's own inputs, to check the model apart from preprocessing.

        Args:
          input_ids: int [u], [B, u] or a list of rows: one -300 a crop; padded on either side.
          pixel_values: float32 [I, C, H, W], in order of appearance; None if there are no crops.
          attention_mask: bool, shaped like `input_ids`: False is padding. Without it the pad id is.

        Raises:
          PromptError: an id is not one of the model's, a row is empty, or the mask does not fit.
          ImageError: the crops are not as many, or not of the shape, that the ids ask for.
        """
        padded = as_rows(input_ids)
        masks = [row != self.config.pad_id for row in padded]
        if attention_mask is not None:
            given = [mask.astype(bool) for mask in as_rows(attention_mask)]
            if [len(mask) for mask in given] != [len(mask) for mask in masks]:
                raise PromptError("attention_mask has another shape than input_ids")
            masks = given
        rows = [row[mask] for row, mask in zip(padded, masks, strict=True)]
        for number, row in enumerate(rows):
            self._check_ids(row, f"row {number} of input_ids")
        side = self.image_settings.side
        pixels = np.asarray(np.zeros((0, 3, side, side)) if pixel_values is None else pixel_values)
        num_crops = sum(row.tolist().count(IMAGE_SLOT) for row in rows)
        if pixels.shape != (num_crops, 3, side, side):
            raise ImageError(
                f"pixel_values has the shape {list(pixels.shape)}, expected "
                f"{[num_crops, 3, side, side]}: one crop for each {IMAGE_SLOT} in input_ids"
            )
        rows = [self._expand(row, row) for row in rows]
        return pad_batch(rows, pixels.transpose(0, 2, 3, 1), self.config, self.buckets)

    def decode(self, tokens: ArrayLike) -> str | list[str]:
        """Decode generated ids up to the first stop id, special ids left out.

        Args:
          tokens: int [N], which gives one text, or [B, N], which gives one a row.

        Raises:
          PromptError: a number before the stop id is not the id of a piece.
        """
        if np.ndim(tokens) == 2:
            return [self._decode_row(row.tolist()) for row in np.asarray(tokens)]
        return self._decode_row(np.asarray(tokens).tolist())

    def stream_text(self) -> TextStream:
        """A decoder that takes generated ids one by one."""
        return TextStream(self.tokenizer)

    def _decode_row(self, ids: list[int]) -> str:
        stops = (n for n, i in enumerate(ids) if i in self.config.eos_ids)
        return self.tokenizer.decode(ids[: next(stops, len(ids))])

    def _example(
        self,
        formatted: Formatted,
        images: Images,
        max_partition: int,
        name: str,
        keep: Literal["all", "first", "last"],
        max_length: int | None = None,
    ) -> Example:
        """Put the images into a formatted conversation, and hold it to the longest length."""
        marks = [self._placeholders(image, max_partition) for image in images]
        ids, labels = np.array(place_images(formatted, marks))
        # "<pad>" spelled out in a text is masked in the original: it has no position, no effect.
        kept = ids != self.config.pad_id
        ids, labels = ids[kept], labels[kept]
        tokens, labels = self._expand(ids, ids), self._expand(labels, ids)
        limit = self.config.multimodal_max_length
        limit = limit if max_length is None else min(limit, max_length)
        if len(tokens) > limit and keep == "all":
            text_length = len(tokens) - self.image_length(images, max_partition)
            raise PromptTooLong(
                f"{name} is {len(tokens)} positions long, more than the {limit} that the model "
                f"reads; {self._advice(limit - text_length, images, max_partition)}"
            )
        side = self.image_settings.side
        pixels = [crops(image, self.image_settings, max_partition)[0] for image in images]
        none = np.zeros((0, side, side, 3), np.float32)
        example = Example(tokens, labels, np.concatenate([none, *pixels]))
        if keep == "first":
            return first_positions(example, limit)
        return last_positions(example, limit, self.config.visual_tokenizer.tokens_per_crop)

    def _placeholders(self, image: Image.Image, max_partition: int) -> list[int]:
        side = self.image_settings.side
        return placeholders(choose_grid(image.width, image.height, side, max_partition))

    def image_length(self, images: Images, max_partition: int) -> int:
        """The positions that images take, indicators and the visual tokens of all their crops."""
        marks = np.array([i for image in images for i in self._placeholders(image, max_partition)])
        return len(self._expand(marks, marks))

    def _expand(self, values: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Repeat the values at each IMAGE_SLOT of `ids`, one a visual token: [u] -> int32 [T]."""
        repeats = np.where(ids == IMAGE_SLOT, self.config.visual_tokenizer.tokens_per_crop, 1)
        return np.repeat(values, repeats).astype(np.int32)

    def _advice(self, room: int, images: Images, max_partition: int) -> str:
        """How a prompt that is too long can be made to fit, with `room` positions for images."""
        for smaller in range(max_partition - 1, 0, -1):
            if images and self.image_length(images, smaller) <= room:
                return f"it fits with max_partition={smaller}"
        return f"shorten the text{' or give fewer images' if images else ''}"

    def _check_ids(self, row: np.ndarray, name: str) -> None:
        vocab_size, lowest = self.config.decoder.vocab_size, IMAGE_SLOT - NUM_IMAGE_INDICATORS
        known = ((row >= 0) & (row < vocab_size)) | ((row >= lowest) & (row <= IMAGE_SLOT))
        if not known.all():
            raise PromptError(
                f"{name} holds {row[~known][0]}, expected ids from 0 to {vocab_size - 1} "
                f"or from {lowest} to {IMAGE_SLOT}"
            )
        if not len(row):
            raise PromptError(f"{name} is nothing but padding")


def _one_each(values: Sequence[Entry], batch: int, name: str) -> Sequence[Entry]:
    if len(values) != batch:
        raise PromptError(
            f"{name} has {len(values)} entries for {batch} prompts; give one for each prompt"
        )
    return values
