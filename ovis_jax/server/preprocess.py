"""Converting request bodies to engine requests: messages and images become arrays."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ovis_jax.engine.request import Delta, Failure, Request
from ovis_jax.errors import ImageError, PromptError, PromptTooLongError
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.conversation import IMAGE_PLACEHOLDER, Turn
from ovis_jax.inputs.open_image import DEFAULT_MAX_PIXELS, decode_image
from ovis_jax.inputs.processor import Processor
from ovis_jax.server.errors import ApiError, bad_request
from ovis_jax.server.images import fetch_if_remote, image_errors, open_images
from ovis_jax.server.request_schema import ChatMessage, ChatRequest, ImagePart, ImageUrl, TextPart

MAX_TOKEN_CHARACTERS = 64
"""Maximum number of characters in a token. A text with more characters per position is rejected
before it is tokenized."""

MAX_THREADS = 2
"""Maximum number of requests whose images are in memory at the same time."""


@dataclass(frozen=True)
class RequestLimits:
    """Limits on each request.

    Attributes:
      max_body_bytes: Maximum size of the body in bytes, and of all fetched images together.
      max_images: Maximum number of images.
      max_pixels: Maximum total number of pixels in all images.
      max_tokens: Maximum number of tokens per answer.
      request_timeout: Maximum time in seconds for the body to arrive, and separately for the
        answer.
      max_partition: Maximum number of cells per image.
      allow_remote_images: Whether to fetch images from other servers.
    """

    max_body_bytes: int = 32 * 2**20
    max_images: int = 16
    max_pixels: int = DEFAULT_MAX_PIXELS
    max_tokens: int = 2048
    request_timeout: float = 300.0
    max_partition: int = 9
    allow_remote_images: bool = False


@dataclass(frozen=True)
class Preprocessor:
    """Converts request bodies to engine requests.

    Attributes:
      processor: Processor of the model.
      limits: Limits on each request.
      max_model_len: Maximum total length of a prompt and its answer, in positions.
      max_choices: Maximum number of answers per request.
    """

    processor: Processor
    limits: RequestLimits
    max_model_len: int
    max_choices: int
    _threads: Executor = field(default_factory=lambda: ThreadPoolExecutor(MAX_THREADS), init=False)

    async def preprocess(
        self, body: ChatRequest, on_event: Callable[[Delta | Failure], None]
    ) -> Request:
        """Check and convert a request body; the slow part runs in another thread.

        Args:
          body: The request body.
          on_event: Called with each event, as described in `Request`.

        Raises:
          ApiError: The request cannot be answered (status 400).
        """
        limits, deadline = self.limits, time.monotonic() + self.limits.request_timeout
        body.check_supported(self.max_choices)
        turns, images = convert_messages(body.messages)
        max_partition = self._max_partition(body, {image.detail == "low" for image, _ in images})
        if len(images) > limits.max_images:
            message = f"{len(images)} images, but the maximum is {limits.max_images}"
            raise bad_request("messages", message, "too_many_images")
        if sum(len(turn["content"]) for turn in turns) > MAX_TOKEN_CHARACTERS * self.max_model_len:
            raise self._too_long("messages", "the text is far longer than the model can read")
        files: list[tuple[str | bytes, str]] = []
        remaining = limits.max_body_bytes
        for image, param in images:
            allowed = limits.allow_remote_images
            file = await fetch_if_remote(
                image.url, param, allow_remote=allowed, max_bytes=remaining
            )
            remaining -= len(file) if isinstance(file, bytes) else 0
            files.append((file, param))
        tokens, pixels = await asyncio.get_running_loop().run_in_executor(
            self._threads, self._encode, turns, files, max_partition
        )
        seed = secrets.randbits(32) if body.seed is None else body.seed
        return Request(
            tokens=tokens,
            pixels=pixels,
            sampling=sampling_options(body),
            seed=seed % 2**64,
            max_new_tokens=self._max_new_tokens(body, len(tokens)),
            deadline=deadline,
            on_event=on_event,
            num_choices=body.n or 1,
            stop=body.stop_strings,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            stream=bool(body.stream),
        )

    def _encode(
        self, turns: list[Turn], files: Sequence[tuple[str | bytes, str]], max_partition: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a prompt and the crops of its images.

        The prompt's length is checked before any image is decoded.
        """
        max_pixels = self.limits.max_pixels
        try:
            example = self.processor.encode(
                turns,
                open_images(files, max_pixels),
                max_partition=max_partition,
                max_length=self.max_model_len - 1,
                parse_special_tokens=False,
                name="the conversation",
            )
        except PromptTooLongError as error:
            raise self._too_long("messages", str(error)) from None
        except (PromptError, ImageError) as error:
            # The error for a damaged image names the image's field.
            for image, (_, param) in zip(open_images(files, max_pixels), files, strict=True):
                with image_errors(param):
                    decode_image(image)
            raise bad_request("messages", str(error), "invalid_prompt") from None
        return example.tokens, example.pixels

    def _max_partition(self, body: ChatRequest, low: set[bool]) -> int:
        """Return the maximum number of cells per image, from `max_partition` or `detail`."""
        limit = self.limits.max_partition
        if len(low) == 2:
            message = "detail is low for some images only; it must be the same for all"
            raise bad_request("messages", message)
        if body.max_partition is None:
            return 1 if low == {True} else limit
        if body.max_partition > limit:
            message = f"{body.max_partition}, but the maximum is {limit}"
            raise bad_request("max_partition", message)
        return body.max_partition

    def _max_new_tokens(self, body: ChatRequest, prompt_length: int) -> int:
        """Return the maximum number of tokens per answer, from the request and the limits."""
        room, limit = self.max_model_len - prompt_length, self.limits.max_tokens
        param = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        wanted = body.max_completion_tokens or body.max_tokens
        if wanted is None:
            return min(room, limit)
        if wanted > limit:
            raise bad_request(param, f"{wanted}, but the maximum is {limit}")
        if wanted > room:
            message = f"the prompt has {prompt_length} positions and {param} is {wanted}"
            raise self._too_long(param, message)
        return wanted

    def _too_long(self, param: str, message: str) -> ApiError:
        message += f"; prompt and answer together have at most {self.max_model_len} positions"
        return bad_request(param, message, "context_length_exceeded")


def convert_messages(
    messages: Sequence[ChatMessage],
) -> tuple[list[Turn], list[tuple[ImageUrl, str]]]:
    """Convert messages to the turns of a Gemma2 conversation.

    System and developer messages are prepended to the next user turn.

    Returns:
      The turns, with "<image>" for each image, and the images, each with the path of its field.

    Raises:
      ApiError: A text contains "<image>", or the last message is not a user message (status 400).
    """
    turns: list[Turn] = []
    images: list[tuple[ImageUrl, str]] = []
    system: list[str] = []
    for number, message in enumerate(messages):
        name, content = f"messages[{number}].content", message.content
        parts = (
            [(name, TextPart(type="text", text=content))]
            if isinstance(content, str)
            else [(f"{name}[{index}]", part) for index, part in enumerate(content)]
        )
        texts: list[str] = []
        for param, part in parts:
            if isinstance(part, ImagePart):
                if message.role != "user":
                    raise bad_request(param, "only user messages may contain images")
                images.append((part.image_url, f"{param}.image_url.url"))
                texts.append(IMAGE_PLACEHOLDER)
            elif IMAGE_PLACEHOLDER in part.text:
                raise bad_request(param, f"text must not contain {IMAGE_PLACEHOLDER!r}")
            else:
                texts.append(part.text)
        text = "\n".join(texts)
        if message.role in ("system", "developer"):
            system.append(text.strip())
        elif message.role == "user":
            turns.append({"role": "user", "content": "\n\n".join([*system, text])})
            system = []
        else:
            turns.append({"role": "assistant", "content": text})
    if system or not turns or turns[-1]["role"] != "user":
        raise bad_request("messages", "the last message must be the user's", "invalid_prompt")
    return turns, images


def sampling_options(body: ChatRequest) -> Sampling:
    """Return the sampling parameters from a body; the API's default temperature is 1."""
    temperature = 1.0 if body.temperature is None else body.temperature
    if temperature == 0:
        return Sampling(repetition_penalty=body.repetition_penalty)
    # As with any very small value, 0 keeps only the most likely token.
    top_p = None if body.top_p in (None, 1) else max(float(body.top_p), 1e-6)
    return Sampling(temperature, body.top_k, top_p, body.repetition_penalty)
