"""Converting prompts and images to the model's input arrays, and generated ids to text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from ovis_jax.config import NUM_IMAGE_INDICATORS, OvisConfig
from ovis_jax.errors import ConfigError, ImageError, PromptError, PromptTooLongError
from ovis_jax.inputs.batch import Example, Inputs, pad_batch, truncate_left, truncate_right
from ovis_jax.inputs.buckets import Bucket
from ovis_jax.inputs.conversation import (
    CHAT_FORMATS,
    IGNORE_INDEX,
    ChatFormat,
    EncodedConversation,
    Prompt,
    Turn,
    encode_conversation,
    encode_prompt,
    insert_image_placeholders,
    parse_prompt,
)
from ovis_jax.inputs.image_processing import (
    IMAGE_SLOT,
    ImageLayout,
    ImageProcessorConfig,
    ImageSize,
    choose_grid,
    crop_boxes_with_thumbnail,
    fitted_sizes,
    image_placeholder_ids,
    load_image,
    preprocess_image,
)
from ovis_jax.inputs.open_image import ImageSource, list_images, open_image
from ovis_jax.inputs.tokenizer import Tokenizer

Images = ImageSource | Sequence[ImageSource]
"""The images of one prompt, or a single image."""


@dataclass(frozen=True, repr=False)
class Processor:
    """Converts between the user's text and images and the model's arrays.

    Attributes:
      config: The model's config.
      tokenizer: The model's tokenizer.
      image_config: Crop size and normalization.
      buckets: Shapes that batches are padded to; if empty, the default sizes in inputs/buckets.py.
    """

    config: OvisConfig
    tokenizer: Tokenizer
    image_config: ImageProcessorConfig
    buckets: tuple[Bucket, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path, config: OvisConfig) -> Self:
        """Read the tokenizer and preprocessor_config.json of a checkpoint folder.

        Raises:
          ConfigError: A file is missing, is not supported, or does not match `config`.
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
        chat_format = CHAT_FORMATS[config.decoder.model_type]
        for piece, i in [(chat_format.bos, config.bos_id), (chat_format.pad, config.pad_id)]:
            if tokenizer.token_to_id(piece) != i:
                raise ConfigError(
                    f"{folder}: the tokenizer gives {piece} the id {tokenizer.token_to_id(piece)}, "
                    f"but generation_config.json gives it {i}; use the tokenizer of this checkpoint"
                )
        image_config = ImageProcessorConfig.from_folder(folder, config.vision.image_size)
        return cls(config, tokenizer, image_config)

    @property
    def chat_format(self) -> ChatFormat:
        """The format of the model's conversations."""
        return CHAT_FORMATS[self.config.decoder.model_type]

    def __repr__(self) -> str:
        size, tokens = self.image_config.crop_size, self.config.visual_tokenizer.tokens_per_crop
        buckets = ", ".join("x".join(map(str, bucket)) for bucket in self.buckets)
        return (
            f"Processor({len(self.tokenizer.pieces):,} text tokens, {size} x {size} pixel crops "
            f"with {tokens} visual tokens each, at most {self.config.multimodal_max_length:,} "
            f"positions, buckets: {buckets or 'default'})"
        )

    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        images: Images | Sequence[Images] | None = None,
        *,
        max_partition: int | Sequence[int] = 9,
        assistant_prefix: str | Sequence[str] = "",
        truncate: bool = False,
        parse_special_tokens: bool = True,
    ) -> Inputs:
        """Convert prompts to a padded batch of model inputs.

        Args:
          prompts: One prompt, or a list of B prompts. A prompt is a string or a list of turns
            `{"role": "user" | "assistant", "content": CONTENT}`, where CONTENT is a string or a
            list of OpenAI content parts, which may contain images. With Llama, a turn before the
            last may also have the role "system". "<image>" in a text marks the place of an image;
            if no text contains "<image>", the images come first.
          images: For one prompt, an image or a list of images; for B prompts, a list with one such
            entry per prompt. `open_image` lists the forms that an image may have.
          max_partition: Maximum number of cells that an image is cut into; one number for all
            prompts, or one number per prompt.
          assistant_prefix: Text that the answer begins with; one text for all prompts, or one text
            per prompt.
          truncate: Whether to truncate prompts that are too long. The last positions are kept, so
            the first images and the beginning of the text are dropped.
          parse_special_tokens: Whether special tokens such as "<eos>" in a text become their ids,
            as in the original. Pass False for untrusted text.

        Returns:
          `Inputs` with tokens and positions as int32 [B, T] and pixels as float32 [I, h, w, C].

        Raises:
          PromptError: A prompt is empty or malformed, or does not match its images.
          PromptTooLongError: A prompt is too long, and `truncate` is False.
          ImageError: An image cannot be read, decoded or cut into crops.
          RequestError: The batch does not fit into any of the processor's `buckets`.
        """
        if isinstance(prompts, list | tuple) and not prompts:
            raise PromptError(f"prompts are {prompts!r}, expected at least one prompt")
        one_prompt = (
            isinstance(prompts, str | bytes)
            or not isinstance(prompts, Sequence)
            or isinstance(prompts[0], Mapping)
        )
        if one_prompt:
            prompts, images = [cast(Prompt, prompts)], [cast(Images, images)]
        batch = len(prompts)
        if images is None:
            images = [()] * batch
        arguments = zip(
            cast(Sequence[Prompt], prompts),
            _one_each(list_images(cast(Images, images), "the prompts"), batch, "images"),
            _one_each(max_partition, batch, "max_partition"),
            _one_each(assistant_prefix, batch, "assistant_prefix"),
            strict=True,
        )
        examples = [
            self.encode(
                prompt,
                row_images,
                max_partition=partition,
                assistant_prefix=prefix,
                truncate=truncate,
                parse_special_tokens=parse_special_tokens,
                name="the prompt" if one_prompt else f"prompts[{b}]",
            )
            for b, (prompt, row_images, partition, prefix) in enumerate(arguments)
        ]
        pixels = np.concatenate([example.pixels for example in examples])
        return pad_batch([e.tokens for e in examples], pixels, self.config, self.buckets)

    def encode(
        self,
        prompt: Prompt,
        images: Images | None = None,
        *,
        max_partition: int | Sequence[int] = 9,
        assistant_prefix: str = "",
        max_length: int | None = None,
        truncate: bool = False,
        parse_special_tokens: bool = True,
        parse_image_placeholders: bool = True,
        decode: Callable[[Image.Image], Image.Image] = load_image,
        name: str = "the prompt",
    ) -> Example:
        """Encode one prompt without padding.

        If the images are PIL images that were opened but not yet loaded, the length is checked
        before any image is decoded.

        Args:
          prompt: The prompt, as in `__call__`.
          images: The images of the prompt, as in `__call__`.
          max_partition: Maximum number of cells that an image is cut into; one number for all
            images, or one number per image in order of appearance.
          assistant_prefix: Text that the answer begins with.
          max_length: Maximum number of positions, at most the model's own limit, which is the
            default.
          truncate: Whether to truncate a prompt that is too long, as in `__call__`.
          parse_special_tokens: Whether special tokens in a text become their ids.
          parse_image_placeholders: Whether "<image>" in a text marks the place of an image. If
            False, it is ordinary text, and only content parts place images; pass False for
            untrusted text.
          decode: Function that decodes each opened image after the length is checked.
          name: Name of the prompt in error messages.

        Returns:
          An `Example` with tokens as int32 [T] and pixels as float32 [I, h, w, C].

        Raises:
          PromptError: The prompt is empty or malformed, or does not match its images.
          PromptTooLongError: The prompt is too long, and `truncate` is False.
          ImageError: An image cannot be read, decoded or cut into crops.
        """
        turns, sources = parse_prompt(
            prompt,
            list_images(images, name),
            name,
            chat_format=self.chat_format,
            parse_image_placeholders=parse_image_placeholders,
        )
        encoded = encode_prompt(
            turns,
            self.tokenizer,
            assistant_prefix,
            chat_format=self.chat_format,
            parse_special_tokens=parse_special_tokens,
            parse_image_placeholders=parse_image_placeholders,
            name=name,
        )
        side = "left" if truncate else None
        return self._build_example(encoded, sources, max_partition, max_length, side, name, decode)

    def encode_training_example(
        self,
        turns: Sequence[Turn],
        images: Images | None = None,
        *,
        max_partition: int = 9,
        max_length: int | None = None,
        truncate: bool = False,
        parse_special_tokens: bool = True,
    ) -> Example:
        """Encode a conversation for training; the assistant turns become labels.

        Args:
          turns: The conversation.
          images: The images in order of appearance.
          max_partition: Maximum number of cells that an image is cut into.
          max_length: Maximum number of positions, at most the model's own limit, which is the
            default.
          truncate: Whether to truncate a conversation that is too long. The first positions are
            kept, so the last answers are dropped.
          parse_special_tokens: Whether special tokens in a text become their ids.

        Returns:
          An `Example` with tokens and labels as int32 [T] and pixels as float32 [I, h, w, C].

        Raises:
          PromptError: The conversation is malformed, is too long, does not match its images, or has
            no assistant turn that contributes to the loss. With `truncate`, the error is also
            raised if the cut would go through an image or leave no answer.
          ImageError: An image cannot be read, decoded or cut into crops.
        """
        name = "the conversation"
        images = list_images(images, name)
        encoded, sources = self._encode_training_turns(turns, images, name, parse_special_tokens)
        side = "right" if truncate else None
        return self._build_example(encoded, sources, max_partition, max_length, side, name)

    def measure_training_example(
        self,
        turns: Sequence[Turn],
        image_sizes: Sequence[ImageSize] = (),
        *,
        max_partition: int = 9,
        max_length: int | None = None,
        truncate: bool = False,
        parse_special_tokens: bool = True,
    ) -> tuple[int, int]:
        """Return the number of positions and of crops that `encode_training_example` returns.

        Args:
          turns: The conversation, without images in content parts.
          image_sizes: The sizes of the images in order of appearance.
          max_partition: As in `encode_training_example`, like the other arguments.
          max_length: See `encode_training_example`.
          truncate: See `encode_training_example`.
          parse_special_tokens: See `encode_training_example`.

        Raises:
          PromptError: As in `encode_training_example`.
          ImageError: An image has no pixels or is too narrow, or `max_partition` is below 1.
        """
        name = "the conversation"
        encoded, sizes = self._encode_training_turns(turns, image_sizes, name, parse_special_tokens)
        limit, partitions = self._limits(max_length, max_partition, len(sizes))
        for size, partition in zip(sizes, partitions, strict=True):
            boxes = self.image_layout(size, partition).boxes
            fitted_sizes(size.width, size.height, boxes, self.image_config.crop_size)
        tokens, labels = self._place_images(encoded, sizes, partitions, limit, truncate, name)
        example = Example(tokens, labels, np.zeros(0))
        if truncate:
            example = truncate_right(example, limit)
        num_slots = int(np.count_nonzero(example.tokens == IMAGE_SLOT))
        return len(example.tokens), num_slots // self.config.visual_tokenizer.tokens_per_crop

    def _encode_training_turns(
        self,
        turns: Sequence[Turn],
        images: Sequence[Any],
        name: str,
        parse_special_tokens: bool,
    ) -> tuple[EncodedConversation, list[Any]]:
        """Encode turns without images, and return the images in order of appearance."""
        chat_format = self.chat_format
        parsed, ordered = parse_prompt(turns, images, name, chat_format=chat_format)
        encoded = encode_conversation(
            parsed,
            self.tokenizer,
            chat_format=chat_format,
            parse_special_tokens=parse_special_tokens,
        )
        if all(label == IGNORE_INDEX for label in encoded.labels):
            raise PromptError(
                f"{name} has no assistant turn that contributes to the loss, so there is nothing to"
                " learn"
            )
        return encoded, ordered

    def convert_hf_inputs(
        self,
        input_ids: Sequence[ArrayLike] | np.ndarray,
        pixel_values: ArrayLike | None = None,
        attention_mask: Sequence[ArrayLike] | np.ndarray | None = None,
    ) -> Inputs:
        """Convert inputs of the original PyTorch model, to compare models without preprocessing.

        Args:
          input_ids: Token ids with one -300 per crop: int [u], int [B, u] or a list of rows. The
            padding may be on either side.
          pixel_values: Crops in order of appearance, float32 [I, C, h, w]; None if there are no
            crops.
          attention_mask: Booleans in the shape of `input_ids`, False at padding. By default,
            positions with the pad id are padding.

        Raises:
          PromptError: An id is unknown, a row is empty, or the mask has the wrong shape.
          ImageError: The number of crops does not match the ids, or their shape is wrong.
        """
        padded = _as_rows(input_ids)
        masks = [row != self.config.pad_id for row in padded]
        if attention_mask is not None:
            given = [mask.astype(bool) for mask in _as_rows(attention_mask)]
            if [len(mask) for mask in given] != [len(mask) for mask in masks]:
                raise PromptError("attention_mask and input_ids have different shapes")
            masks = given
        rows = [row[mask] for row, mask in zip(padded, masks, strict=True)]
        for number, row in enumerate(rows):
            self._check_ids(row, f"row {number} of input_ids")
        size = self.image_config.crop_size
        pixels = np.asarray(np.zeros((0, 3, size, size)) if pixel_values is None else pixel_values)
        num_crops = sum(row.tolist().count(IMAGE_SLOT) for row in rows)
        if pixels.shape != (num_crops, 3, size, size):
            raise ImageError(
                f"pixel_values has the shape {list(pixels.shape)}, expected "
                f"{[num_crops, 3, size, size]}: one crop for each {IMAGE_SLOT} in input_ids"
            )
        rows = [self._expand(row, row) for row in rows]
        return pad_batch(rows, pixels.transpose(0, 2, 3, 1), self.config, self.buckets)

    def decode(self, tokens: ArrayLike) -> str | list[str]:
        """Decode generated ids up to the first stop id, skipping special tokens.

        Args:
          tokens: Token ids: int [n] for one text, or int [B, n] for one text per row.

        Raises:
          PromptError: A number before the stop id is not a token id.
        """
        if np.ndim(tokens) == 2:
            return [cast(str, self.decode(row)) for row in np.asarray(tokens)]
        ids = np.asarray(tokens).tolist()
        stops = (n for n, i in enumerate(ids) if i in self.config.eos_ids)
        return self.tokenizer.decode(ids[: next(stops, len(ids))])

    def image_layout(self, image: Image.Image | ImageSize, max_partition: int = 9) -> ImageLayout:
        """Return the crops that an image is cut into, and the number of positions that it takes.

        Raises:
          ImageError: The image has no pixels, `max_partition` is below 1, or a TIFF file cannot be
            decoded.
        """
        # Decoding a TIFF file may swap its width and height.
        if isinstance(image, Image.Image) and image.format == "TIFF":
            load_image(image)
        size, tokens = self.image_config.crop_size, self.config.visual_tokenizer.tokens_per_crop
        grid = choose_grid(image.width, image.height, size, max_partition)
        boxes = crop_boxes_with_thumbnail(image.width, image.height, grid)
        ids = image_placeholder_ids(grid)
        return ImageLayout(grid, boxes, ids, len(ids) + len(boxes) * (tokens - 1))

    def count_image_tokens(
        self, images: Sequence[Image.Image | ImageSize], max_partition: int | Sequence[int] = 9
    ) -> int:
        """Count the positions that images take in a prompt: visual tokens and image indicators."""
        partitions = _one_each(max_partition, len(images), "max_partition", "image")
        return sum(layout.num_tokens for layout in map(self.image_layout, images, partitions))

    def _build_example(
        self,
        encoded: EncodedConversation,
        sources: Sequence[ImageSource],
        max_partition: int | Sequence[int],
        max_length: int | None,
        truncation_side: Literal["left", "right"] | None,
        name: str,
        decode: Callable[[Image.Image], Image.Image] = load_image,
    ) -> Example:
        """Insert the images into an encoded conversation, and enforce the maximum length."""
        images = [open_image(x, f"image {n} of {name}") for n, x in enumerate(sources, 1)]
        limit, partitions = self._limits(max_length, max_partition, len(images))
        may_be_longer = truncation_side is not None
        self._place_images(encoded, images, partitions, limit, may_be_longer, name)
        # Decoding may swap the width and height, so the layouts are computed again.
        size = self.image_config.crop_size
        pixels = [np.zeros((0, size, size, 3), np.float32)]
        sizes: list[ImageSize] = []
        for image, partition in zip(images, partitions, strict=True):
            decoded = decode(image)
            sizes.append(ImageSize(*decoded.size))
            pixels.append(preprocess_image(decoded, self.image_config, partition)[0])
        placed = self._place_images(encoded, sizes, partitions, limit, may_be_longer, name)
        example = Example(*placed, np.concatenate(pixels))
        if truncation_side == "right":
            return truncate_right(example, limit)
        return truncate_left(example, limit, self.config.visual_tokenizer.tokens_per_crop)

    def _limits(
        self, max_length: int | None, max_partition: int | Sequence[int], num_images: int
    ) -> tuple[int, Sequence[int]]:
        """Return the maximum number of positions, and the maximum partition of each image."""
        if max_length is not None and max_length < 1:
            raise PromptError(f"max_length is {max_length}, expected at least 1")
        limit = self.config.multimodal_max_length
        limit = limit if max_length is None else min(limit, max_length)
        return limit, _one_each(max_partition, num_images, "max_partition", "image")

    def _place_images(
        self,
        encoded: EncodedConversation,
        images: Sequence[Image.Image | ImageSize],
        partitions: Sequence[int],
        limit: int,
        may_be_longer: bool,
        name: str,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and labels with the placeholders of images, int32 [T]."""
        layouts = list(map(self.image_layout, images, partitions))
        placed = insert_image_placeholders(encoded, [x.placeholder_ids for x in layouts])
        ids, labels = np.array(placed)
        # Pad ids come from the pad token spelled out in a text. The original only masks them: they
        # take places in the sliding window and, outside of `generate`, positions (README.md).
        kept = ids != self.config.pad_id
        ids, labels = ids[kept], labels[kept]
        tokens, labels = self._expand(ids, ids), self._expand(labels, ids)
        if len(tokens) > limit and not may_be_longer:
            room = limit - len(tokens) + sum(layout.num_tokens for layout in layouts)
            raise PromptTooLongError(
                f"{name} is {len(tokens)} positions long, more than the {limit} allowed; "
                f"{self._advise(room, images, partitions)}"
            )
        return tokens, labels

    def _expand(self, values: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Repeat the value at each IMAGE_SLOT in `ids` once per visual token: [u] -> int32 [T]."""
        repeats = np.where(ids == IMAGE_SLOT, self.config.visual_tokenizer.tokens_per_crop, 1)
        return np.repeat(values, repeats).astype(np.int32)

    def _advise(
        self, room: int, images: Sequence[Image.Image | ImageSize], partitions: Sequence[int]
    ) -> str:
        """Return advice on how to shorten a prompt so that images fit into `room` positions."""
        for smaller in range(max(partitions, default=1) - 1, 0, -1):
            if self.count_image_tokens(images, [min(smaller, x) for x in partitions]) <= room:
                return f"it fits with max_partition={smaller}"
        return f"shorten the text{' or pass fewer images' if images else ''}"

    def _check_ids(self, row: np.ndarray, name: str) -> None:
        vocab_size, lowest = self.config.decoder.vocab_size, IMAGE_SLOT - NUM_IMAGE_INDICATORS
        known = ((row >= 0) & (row < vocab_size)) | ((row >= lowest) & (row <= IMAGE_SLOT))
        if not known.all():
            raise PromptError(
                f"{name} contains {row[~known][0]}, expected ids from 0 to {vocab_size - 1} "
                f"or from {lowest} to {IMAGE_SLOT}"
            )
        if not len(row):
            raise PromptError(f"{name} contains only padding")


def _one_each(values: Any, number: int, name: str, item: str = "prompt") -> Sequence[Any]:
    """Return one value per item; a single number or string is used for all items."""
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
        return [values] * number
    if len(values) != number:
        raise PromptError(
            f"{name} has length {len(values)}, expected {number}: one entry for each {item}"
        )
    return cast(Sequence[Any], values)


def _as_rows(values: Sequence[ArrayLike] | np.ndarray) -> list[np.ndarray]:
    """Return a batch, or one row, as a list of rows."""
    if not len(values):
        raise PromptError("input_ids is empty, expected at least one row of ids")
    if np.ndim(values[0]) == 0:
        return [np.asarray(values)]
    return [np.asarray(row) for row in values]
