"""A request becomes a job: messages and images become the arrays that the model reads."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ovis_jax.errors import ImageError, PromptError, PromptTooLong
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.conversation import IMAGE_TEXT, Turn
from ovis_jax.inputs.image import IMAGE_SLOT
from ovis_jax.inputs.processor import Processor
from ovis_jax.serving.answer import Event, Job
from ovis_jax.serving.decoding import MAX_PIXELS
from ovis_jax.serving.images import ImageLimits, decode, fetch_image, open_images
from ovis_jax.serving.refusals import ApiError
from ovis_jax.serving.schema import ChatRequest, ImagePart, Message, TextPart

LONGEST_PIECE = 64
"""Characters a token could have: a text with more than so many a position is not even read."""

AT_ONCE = 2
"""Requests whose images are in memory at the same time."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
      max_body: bytes of its body.
      max_images: images.
      max_pixels: pixels of its images together.
      max_tokens: tokens of an answer.
      seconds: that its body may take to arrive, and then its answer to its last token.
      max_partition: the most cells an image is cut into.
      remote_images: whether images of other servers are fetched.
    """

    max_body: int = 32 * 2**20
    max_images: int = 16
    max_pixels: int = MAX_PIXELS
    max_tokens: int = 2048
    seconds: float = 300.0
    max_partition: int = 9
    remote_images: bool = False


@dataclass(frozen=True)
class Preparation:
    """Makes jobs of requests; one for all of a server.

    Attributes:
      processor: of the model.
      limits: what a request may ask for.
      max_length: positions that a prompt and its answer may take together.
      choices: the most answers of a request.
    """

    processor: Processor
    limits: Limits
    max_length: int
    choices: int
    _threads: Executor = field(default_factory=lambda: ThreadPoolExecutor(AT_ONCE), init=False)

    async def __call__(self, request: ChatRequest, emit: Callable[[Event], None]) -> Job:
        """Check a request and read its images; the slow part in another thread.

        Raises:
          ApiError: the request cannot be answered as it is.
        """
        deadline = time.monotonic() + self.limits.seconds
        request.check(self.choices)
        partition = self._partition(request)
        turns, places = read_messages(request.messages)
        if len(places) > self.limits.max_images:
            raise ApiError(
                400,
                f"messages: {len(places)} images, at most {self.limits.max_images} are taken",
                param="messages",
                code="too_many_images",
            )
        if sum(len(turn["content"]) for turn in turns) > LONGEST_PIECE * self.max_length:
            raise self._too_long("the text is far longer than the model can read")
        limits = self.limits
        image_limits = ImageLimits(limits.max_body, limits.max_pixels, limits.remote_images)
        files: list[tuple[str | bytes, str]] = []
        left = limits.max_body
        for name, image in places:
            room = image_limits._replace(max_bytes=left)
            file = await fetch_image(image.image_url.url, name, room)
            left -= len(file) if isinstance(file, bytes) else 0
            files.append((file, name))
        tokens, pixels = await asyncio.get_running_loop().run_in_executor(
            self._threads, self._arrays, turns, files, image_limits, partition
        )
        seed = secrets.randbits(32) if request.seed is None else request.seed
        return Job(
            tokens=tokens,
            pixels=pixels,
            sampling=sampling(request),
            seed=seed % 2**64,
            max_new_tokens=self._room(request, len(tokens)),
            deadline=deadline,
            emit=emit,
            choices=request.n or 1,
            stop=request.stops,
            top=(request.top_logprobs or 0) if request.logprobs else None,
            whole=not request.stream,
        )

    def _arrays(
        self, turns: list[Turn], files: list[Any], limits: ImageLimits, partition: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a prompt and the crops of its images, neither padded."""
        images = open_images(files, limits)
        try:
            length = self.processor.image_length(images, partition)
            if length >= self.max_length:
                raise self._too_long(f"the images take {length} positions")
            for image, (_, name) in zip(images, files, strict=True):
                decode(image, name)
            inputs = self.processor([turns], [images], max_partition=partition, control=False)
        except (PromptError, ImageError) as error:
            message = str(error).replace("prompts[0]", "the conversation")
            too_long = isinstance(error, PromptTooLong)
            code = "context_length_exceeded" if too_long else "invalid_prompt"
            raise ApiError(400, f"messages: {message}", param="messages", code=code) from None
        tokens = inputs.tokens[0][inputs.positions[0] >= 0]
        slots = int(np.count_nonzero(tokens == IMAGE_SLOT))
        crops = slots // self.processor.config.visual_tokenizer.tokens_per_crop
        return tokens, inputs.pixels[:crops]

    def _partition(self, request: ChatRequest) -> int:
        """The most cells of an image, from the field of that name or the detail of the images."""
        most = self.limits.max_partition
        details = {
            (part.image_url.detail or "auto") == "low"
            for message in request.messages
            for part in ([] if isinstance(message.content, str) else message.content)
            if isinstance(part, ImagePart)
        }
        if len(details) == 2:
            raise ApiError(
                400,
                "messages: detail is low for some images and not for others; all are cut alike",
                param="messages",
                code="invalid_value",
            )
        if request.max_partition is not None:
            if request.max_partition > most:
                message = f"max_partition: {request.max_partition}, at most {most} is allowed"
                raise ApiError(400, message, param="max_partition", code="invalid_value")
            return request.max_partition
        return 1 if details == {True} else most

    def _room(self, request: ChatRequest, length: int) -> int:
        """The tokens that an answer may take."""
        room, asked = self.max_length - length, request.most_tokens
        if room < 1:
            raise self._too_long(f"the prompt takes {length} positions")
        if asked is None:
            return min(room, self.limits.max_tokens)
        name = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        if asked > self.limits.max_tokens:
            message = f"{name}: {asked}, at most {self.limits.max_tokens} are allowed"
            raise ApiError(400, message, param=name, code="invalid_value")
        if asked > room:
            raise self._too_long(f"the prompt takes {length} positions and {name} is {asked}", name)
        return asked

    def _too_long(self, message: str, param: str = "messages") -> ApiError:
        message = f"{param}: {message}; together they may take {self.max_length}"
        return ApiError(400, message, param=param, code="context_length_exceeded")


def read_messages(messages: Sequence[Message]) -> tuple[list[Turn], list[tuple[str, ImagePart]]]:
    """The turns that Gemma2 knows, with a mark for each image, and the images with their fields.

    What system and developer say goes before the next turn of the user.

    Raises:
      ApiError: a text holds the mark itself, or nothing of the user follows a system turn.
    """
    turns: list[Turn] = []
    images: list[tuple[str, ImagePart]] = []
    before: list[str] = []
    for number, message in enumerate(messages):
        name = f"messages[{number}].content"
        content = message.content
        parts = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        texts: list[str] = []
        for place, part in enumerate(parts):
            where = name if isinstance(content, str) else f"{name}[{place}]"
            if isinstance(part, ImagePart):
                if message.role != "user":
                    raise ApiError(
                        400,
                        f"{where}: only the user can show an image",
                        param=where,
                        code="invalid_value",
                    )
                images.append((f"{where}.image_url.url", part))
                texts.append(IMAGE_TEXT)
            elif IMAGE_TEXT in part.text:
                message_text = f"{where}: {IMAGE_TEXT!r} in a text is a mark of the model's own"
                raise ApiError(400, message_text, param=where, code="invalid_value")
            else:
                texts.append(part.text)
        text = "\n".join(texts)
        if message.role in ("system", "developer"):
            before.append(text.strip())
        elif message.role == "user":
            turns.append({"role": "user", "content": "\n\n".join([*before, text])})
            before = []
        else:
            turns.append({"role": "assistant", "content": text})
    if before or not turns or turns[-1]["role"] != "user":
        raise ApiError(
            400,
            "messages: the last message has to be the user's",
            param="messages",
            code="invalid_prompt",
        )
    return turns, images


def sampling(request: ChatRequest) -> Sampling:
    """How a request wants its tokens picked; the API's own temperature is 1."""
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = request.top_p
    if temperature == 0:
        return Sampling(repetition_penalty=request.repetition_penalty)
    # 0 keeps the likeliest, as does everything too small to reach a second one.
    top_p = None if top_p in (None, 1) else max(float(top_p), 1e-6)
    return Sampling(temperature, request.top_k, top_p, request.repetition_penalty)
