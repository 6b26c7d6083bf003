"""Converting request bodies to engine requests: messages and images become arrays."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

from PIL import Image

from ovis_jax.engine.constraints import ConstraintCompiler, ConstraintError, Matcher
from ovis_jax.engine.request import (
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    Delta,
    Failure,
    Request,
)
from ovis_jax.errors import ImageError, PromptError, PromptTooLongError
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.batch import Example
from ovis_jax.inputs.conversation import Turn
from ovis_jax.inputs.open_image import DEFAULT_MAX_IMAGE_PIXELS, DEFAULT_MAX_PIXELS, decode_image
from ovis_jax.inputs.processor import Processor
from ovis_jax.server.errors import ApiError, bad_request
from ovis_jax.server.image_threads import ImageThreads
from ovis_jax.server.images import fetch_if_remote, image_errors, open_images
from ovis_jax.server.request_schema import (
    ChatMessage,
    ChatRequest,
    ImagePart,
    ImageUrl,
    PromptOptions,
    TextPart,
)

MAX_TOKEN_CHARACTERS = 64
"""Maximum number of characters in a token. A text that is longer than this number times the maximum
number of positions is rejected before it is tokenized."""

MAX_THREADS = 2
"""Maximum number of requests whose images are decoded at the same time. The same number of threads
encodes prompts without images."""


@dataclass(frozen=True)
class RequestLimits:
    """Limits on each request, and on all requests that are being received or answered.

    Attributes:
      max_body_bytes: Maximum size of the body in bytes, and of all fetched images together.
      max_total_body_bytes: Maximum size of the bodies of all requests, in bytes.
      max_requests: Maximum number of requests.
      max_requests_per_client: Maximum number of requests per client; None for half of
        `max_requests`.
      max_images: Maximum number of images.
      max_pixels: Maximum total number of pixels in all images.
      max_image_pixels: Maximum number of pixels per image.
      max_tokens: Maximum number of tokens per answer.
      body_timeout: Maximum time in seconds for the body to arrive.
      request_timeout: Maximum time in seconds for the answer, after the body has arrived.
      max_partition: Maximum number of cells per image.
      allow_remote_images: Whether to fetch images from other servers.
    """

    max_body_bytes: int = 32 * 2**20
    max_total_body_bytes: int = 2**30
    max_requests: int = 352
    max_requests_per_client: int | None = None
    max_images: int = 16
    max_pixels: int = DEFAULT_MAX_PIXELS
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS
    max_tokens: int = 2048
    body_timeout: float = 60.0
    request_timeout: float = 300.0
    max_partition: int = 9
    allow_remote_images: bool = False


def default_max_requests(max_num_seqs: int, max_queued_requests: int, num_engines: int = 1) -> int:
    """Return the maximum number of requests of a server, from the sizes of each engine."""
    return 4 * num_engines * (max_num_seqs + max_queued_requests) + 64


@dataclass
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
    _constraints: ConstraintCompiler = field(init=False)
    _threads: Executor = field(default_factory=lambda: ThreadPoolExecutor(MAX_THREADS), init=False)
    _image_threads: ImageThreads = field(
        default_factory=lambda: ImageThreads(MAX_THREADS), init=False
    )

    def __post_init__(self) -> None:
        config = self.processor.config
        self._constraints = ConstraintCompiler(
            self.processor.tokenizer, config.decoder.vocab_size, config.eos_ids
        )

    async def preprocess(
        self, body: ChatRequest, on_event: Callable[[Delta | Failure], None]
    ) -> Request:
        """Check and convert a request body; the slow part runs in another thread.

        Args:
          body: The request body.
          on_event: Called with each event, as described in `Request`.

        Raises:
          ApiError: The request cannot be answered (status 400), or its images are not decoded in
            time (status 503).
        """
        deadline = time.monotonic() + self.limits.request_timeout
        body.check_supported(self.max_choices)
        self._check_token_ids(body)
        matchers = await self._compile_constraint(body)
        try:
            async with asyncio.timeout(self.limits.request_timeout):
                example = await self.encode_messages(body, body.messages)
        except TimeoutError:
            message = (
                f"the images were not decoded within {self.limits.request_timeout:g} seconds,"
                " because the server is busy; --request-timeout raises this limit"
            )
            headers = {"x-should-retry": "false"}
            raise ApiError(503, message, code="deadline_exceeded", headers=headers) from None
        seed = secrets.randbits(32) if body.seed is None else body.seed
        request = Request(
            tokens=example.tokens,
            pixels=example.pixels,
            sampling=sampling_options(body),
            seed=seed % 2**64,
            max_new_tokens=self._max_new_tokens(body, len(example.tokens)),
            deadline=deadline,
            on_event=on_event,
            num_choices=body.n or 1,
            stop=body.stop_strings,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            min_tokens=body.min_tokens or 0,
            logit_bias=tuple((int(i), bias) for i, bias in (body.logit_bias or {}).items()),
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            matchers=matchers,
            stream=bool(body.stream),
        )
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, getattr, request, "crop_digests")
        return request

    async def _compile_constraint(self, body: ChatRequest) -> tuple[Matcher, ...]:
        """Compile the constraint of a request, if it has one, in another thread."""
        constraint = body.constraint()
        if constraint is None:
            return ()
        if body.ignore_eos:
            raise bad_request("ignore_eos", f"{constraint.name} determines the end of the answer")
        try:
            return await asyncio.wrap_future(self._constraints.compile(constraint, body.n or 1))
        except ConstraintError as error:
            raise ApiError(400, str(error), param=error.name, code="invalid_constraint") from None

    async def encode_messages(self, body: PromptOptions, messages: list[ChatMessage]) -> Example:
        """Encode messages as a prompt; the slow part runs in another thread.

        Raises:
          ApiError: The messages are not a prompt, or are too long (status 400).
        """
        limits = self.limits
        body.check_messages(messages)
        turns, images, prefix = convert_messages(
            messages,
            interleave=bool(body.interleave),
            system_turns=self.processor.chat_format.has_system_turns,
        )
        partitions = self._max_partitions(body, images)
        if len(images) > limits.max_images:
            message = f"{len(images)} images, but the maximum is {limits.max_images}"
            raise bad_request("messages", message, "too_many_images")
        self._check_text_length("messages", *(text for m in messages for text in m.texts))
        files: list[tuple[str | bytes, str]] = []
        remaining = limits.max_body_bytes
        for image, param in images:
            allowed = limits.allow_remote_images
            file = await fetch_if_remote(
                image.url, param, allow_remote=allowed, max_bytes=remaining
            )
            remaining -= len(file) if isinstance(file, bytes) else 0
            files.append((file, param))
        if not files:
            encode = partial(self._encode, turns, [], files, partitions, prefix)
            return await asyncio.get_running_loop().run_in_executor(self._threads, encode)
        opened = await self._image_threads.run(0, self._open_images, files)
        num_pixels = sum(image.width * image.height for image in opened)
        return await self._image_threads.run(
            num_pixels, self._encode, turns, opened, files, partitions, prefix
        )

    async def encode_text(self, text: str) -> list[int]:
        """Encode the field `prompt` of a request, without `<bos>`, in another thread.

        Raises:
          ApiError: The text is far too long, or it cannot be encoded (status 400).
        """
        self._check_text_length("prompt", text)
        encode = partial(self.processor.tokenizer.encode, text, parse_special_tokens=False)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, encode)
        except PromptError as error:
            raise bad_request("prompt", str(error), "invalid_prompt") from None

    def _check_text_length(self, param: str, *texts: str) -> None:
        """Raise an `ApiError` if texts are so long that tokenizing them is pointless."""
        if sum(map(len, texts)) > MAX_TOKEN_CHARACTERS * self.max_model_len:
            raise self._too_long(param, "the text is far longer than the model can read")

    def _open_images(self, files: Sequence[tuple[str | bytes, str]]) -> list[Image.Image]:
        return open_images(files, self.limits.max_pixels, self.limits.max_image_pixels)

    def _encode(
        self,
        turns: list[Turn],
        images: list[Image.Image],
        files: Sequence[tuple[str | bytes, str]],
        partitions: list[int],
        prefix: str,
    ) -> Example:
        """Encode a prompt and its images; its length is checked before any image is decoded."""
        try:
            return self.processor.encode(
                turns,
                images,
                max_partition=partitions,
                assistant_prefix=prefix,
                max_length=self.max_model_len - 1,
                parse_special_tokens=False,
                decode=decode_image,
                parse_image_placeholders=False,
                name="the conversation",
            )
        except PromptTooLongError as error:
            raise self._too_long("messages", str(error)) from None
        except (PromptError, ImageError) as error:
            # The error for a damaged image names the image's field.
            for image, (_, param) in zip(self._open_images(files), files, strict=True):
                with image_errors(param):
                    decode_image(image)
            raise bad_request("messages", str(error), "invalid_prompt") from None

    def _max_partitions(
        self, body: PromptOptions, images: Sequence[tuple[ImageUrl, str]]
    ) -> list[int]:
        """Return the maximum number of cells of each image, from `max_partition` and `detail`."""
        limit = self.limits.max_partition
        wanted = body.max_partition or limit
        if wanted > limit:
            raise bad_request("max_partition", f"{wanted}, but the maximum is {limit}")
        return [1 if image.detail == "low" else wanted for image, _ in images]

    def _check_token_ids(self, body: ChatRequest) -> None:
        """Check the fields that contain token ids against the vocabulary and the limits."""
        num_ids = len(self.processor.tokenizer.pieces)
        for name, ids, limit in (
            ("logit_bias", list(body.logit_bias or ()), MAX_LOGIT_BIAS),
            ("stop_token_ids", list(map(str, body.stop_token_ids or ())), MAX_STOP_TOKEN_IDS),
        ):
            if len(ids) > limit:
                raise bad_request(name, f"{len(ids)} token ids, but the maximum is {limit}")
            for i in ids:
                if not (i.isascii() and i.isdigit() and len(i) < 10 and int(i) < num_ids):
                    message = f"{i[:20]!r} is not a token id; expected 0 to {num_ids - 1}"
                    raise bad_request(name, message)

    def _max_new_tokens(self, body: ChatRequest, prompt_length: int) -> int:
        """Return the maximum number of tokens per answer, from the request and the limits."""
        room, limit = self.max_model_len - prompt_length, self.limits.max_tokens
        param = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        wanted = body.max_completion_tokens or body.max_tokens
        at_most = min(room, limit) if wanted is None else wanted
        if (body.min_tokens or 0) > at_most:
            message = f"{body.min_tokens}, but the answer has at most {at_most} tokens"
            raise bad_request("min_tokens", message)
        if wanted is None:
            return at_most
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
    messages: Sequence[ChatMessage], *, interleave: bool = False, system_turns: bool = False
) -> tuple[list[Turn], list[tuple[ImageUrl, str]], str]:
    """Convert messages to the turns of a conversation.

    If a message has only one text, its images come before the text, as in the model's training
    data. System and developer messages become system turns or, if the model has none, they are
    prepended to the text of the next user turn.

    Args:
      messages: The messages.
      interleave: Whether images and texts always keep their order.
      system_turns: Whether the model's conversations have system turns.

    Returns:
      The turns, with a part `{"type": "image"}` for each image; the images, each with the path of
      its field; and the text of a last assistant message, which the answer continues.

    Raises:
      ApiError: A message that is not from the user contains an image, or there is no user message
        to answer (status 400).
    """
    turns: list[Turn] = []
    images: list[tuple[ImageUrl, str]] = []
    system: list[str] = []
    for number, message in enumerate(messages):
        name, content = f"messages[{number}].content", message.content or ""
        if isinstance(content, str):
            content = [TextPart(type="text", text=content)]
        parts = [(part, f"{name}[{index}]") for index, part in enumerate(content)]
        if message.role == "user":
            num_texts = sum(isinstance(p, TextPart) and bool(p.text.strip()) for p, _ in parts)
            if num_texts == 1 and not interleave:
                parts.sort(key=lambda part: isinstance(part[0], TextPart))
            images += [
                (part.image_url, f"{param}.image_url.url")
                for part, param in parts
                if isinstance(part, ImagePart)
            ]
            content = [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image"}
                for part, _ in parts
            ]
            turns.append({"role": "user", "content": _prepend_system(system, content, interleave)})
            system = []
            continue
        for part, param in parts:
            if isinstance(part, ImagePart):
                raise bad_request(param, "only user messages may contain images")
        text = "\n".join(message.texts)
        if message.role == "assistant":
            turns.append({"role": "assistant", "content": text})
        elif system_turns:
            turns.append({"role": "system", "content": text})
        elif text.strip():
            system.append(text.strip())
    prefix = ""
    if turns and turns[-1]["role"] == "assistant":
        prefix = turns.pop()["content"]
    if system or not turns or turns[-1]["role"] != "user":
        message = "the last message must be the user's, or an assistant's that follows it"
        raise bad_request("messages", message, "invalid_prompt")
    return turns, images, prefix


def _prepend_system(
    system: Sequence[str], parts: list[dict[str, str]], interleave: bool
) -> list[dict[str, str]]:
    """Put system texts before a user's first text, or with `interleave` before all parts."""
    if not system:
        return parts
    num_before = 0
    if not interleave:
        text_numbers = (n for n, part in enumerate(parts) if part["type"] == "text")
        num_before = next(text_numbers, len(parts))
    before, after = parts[:num_before], parts[num_before:]
    text = "\n\n".join(system)
    if after and after[0]["type"] == "text":
        text, after = f"{text}\n\n{after[0]['text']}", after[1:]
    else:
        text += "\n"  # one more newline separates it from the next part
    return [*before, {"type": "text", "text": text}, *after]


def sampling_options(body: ChatRequest) -> Sampling:
    """Return the sampling parameters from a body; the API's default temperature is 1."""
    temperature = 1.0 if body.temperature is None else body.temperature
    penalties = Sampling(
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty or None,
        presence_penalty=body.presence_penalty or None,
    )
    if temperature == 0:
        return penalties
    # As with any very small value, 0 keeps only the most likely token.
    top_p = None if body.top_p in (None, 1) else max(float(body.top_p), 1e-6)
    top_k = body.top_k if (body.top_k or 0) > 0 else None
    return replace(
        penalties, temperature=temperature, top_k=top_k, top_p=top_p, min_p=body.min_p or None
    )
