"""Requests to the engine, and their output: text, which ends before the first stop string."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from ovis_jax.engine.constraints import Matcher
from ovis_jax.engine.prefix_cache import crop_digests
from ovis_jax.errors import OvisError
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.tokenizer import IncrementalDetokenizer, Tokenizer

FinishReason = Literal["stop", "length"]

MAX_LOGIT_BIAS = 1024
"""Maximum number of token ids in a request's `logit_bias`."""
MAX_STOP_TOKEN_IDS = 64
"""Maximum number of ids in a request's `stop_token_ids`."""


class Logprob(NamedTuple):
    """A token id and its log-probability."""

    token_id: int
    logprob: float


class TokenLogprobs(NamedTuple):
    """A generated token and the most likely tokens at its position, all with log-probabilities."""

    token: Logprob
    top: tuple[Logprob, ...]


class Delta(NamedTuple):
    """New output for one choice of a request."""

    choice: int
    """The index of the choice, starting at 0."""
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    """The tokens that the text consists of; empty if no log-probabilities were requested."""
    finish_reason: FinishReason | None
    """The reason why the choice is complete; None if it is not complete yet."""


class Failure(NamedTuple):
    """The reason why a request failed."""

    message: str
    code: str
    param: str | None = None
    """Name of the part of the request that caused the failure; None for other causes."""


class EngineError(OvisError):
    """A request failed, or the engine no longer accepts requests.

    Args:
      failure: The reason.
    """

    def __init__(self, failure: Failure):
        super().__init__(failure.message)
        self.failure = failure


class EventStream:
    """The events of one request, passed from the engine's thread to an asyncio event loop."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Delta | Failure | None] = asyncio.Queue()

    def put(self, event: Delta | Failure | None) -> None:
        """Add an event from any thread; None ends the stream."""
        with suppress(RuntimeError):  # the event loop is closed, so nothing waits for the event
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def deltas(self, num_choices: int) -> AsyncIterator[Delta]:
        """Yield the deltas until every choice is complete or the stream ends.

        Raises:
          EngineError: The request failed.
        """
        while num_choices and (event := await self._events.get()) is not None:
            if isinstance(event, Failure):
                raise EngineError(event)
            yield event
            num_choices -= event.finish_reason is not None


@dataclass(eq=False)
class Request:
    """A request to the engine.

    Attributes:
      tokens: Token ids of the prompt, int32 [T], without padding, with one IMAGE_SLOT per visual
        token.
      pixels: Crops of the images, float32 [I, h, w, C].
      sampling: Sampling parameters as plain numbers, not arrays.
      seed: Sampling seed, from 0 to 2**64 - 1.
      max_new_tokens: Maximum number of tokens per choice, including the stop id.
      deadline: Time, as in `time.monotonic()`, at which the request fails if it is not complete.
      on_event: Called in the engine's thread with each `Delta`, or with a single `Failure`.
      num_choices: Number of answers to generate.
      stop: Stop strings. An answer ends before the first stop string.
      stop_token_ids: Ids that end an answer, in addition to the model's own stop ids.
      ignore_eos: Whether the model's own stop ids do not end an answer.
      min_tokens: Number of tokens before which neither a stop id nor a stop string ends an answer.
      logit_bias: The numbers that are added to logits, by token id.
      top_logprobs: Number of most likely tokens to report at each position; None for no
        log-probabilities at all.
      matchers: One matcher of the request's constraint per choice; empty if there is no constraint.
      stream: Whether to send a `Delta` for each new piece of text; otherwise, only one `Delta` is
        sent per choice.
      aborted: Whether the caller aborted the request; no more events are then sent.
      first_token_time: Time of the first token, as in `time.monotonic()`; None before that time.
      cached_tokens: Number of prompt positions that were not read, because the KV cache of an
        earlier request contains them.
      cached_crops: Number of crops that were not encoded, because their embeddings were cached.
      completion_tokens: Number of tokens generated so far, in all choices.
      num_started: Number of choices that have been started.
      num_unfinished: Number of choices that are not yet complete.
    """

    tokens: Int32[np.ndarray, "T"]
    pixels: Float32[np.ndarray, "I h w C"]
    sampling: Sampling
    seed: int
    max_new_tokens: int
    deadline: float
    on_event: Callable[[Delta | Failure], None]
    num_choices: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None
    matchers: tuple[Matcher, ...] = ()
    stream: bool = True
    aborted: bool = False
    first_token_time: float | None = None
    cached_tokens: int = 0
    cached_crops: int = 0
    completion_tokens: int = 0
    num_started: int = 0
    num_unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_unfinished = self.num_choices

    @cached_property
    def crop_digests(self) -> tuple[bytes, ...]:
        """A hash of each crop."""
        return crop_digests(self.pixels)

    def stop_ids(self, eos_ids: Iterable[int]) -> tuple[int, ...]:
        """Return the ids that end an answer, given the model's own stop ids."""
        return (*self.stop_token_ids, *(() if self.ignore_eos else eos_ids))


class StopStringFilter:
    """Returns text up to the first stop string, even if a stop string is split over several pieces.

    Text that could be the beginning of a stop string is held back until further text decides this.
    """

    def __init__(self, stop: Iterable[str]):
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add a piece of text.

        Returns:
          The text that can be output now, and whether a stop string was found. If so, the text ends
          before the stop string.
        """
        text = self._held + text
        found = [(i + len(stop), i) for stop in self._stop if (i := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        prefixes = (stop[:n] for stop in self._stop for n in range(1, len(stop)))
        kept = max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], False

    def finish(self) -> str:
        """Return the text that is still held back; call this at the end of the input."""
        held, self._held = self._held, ""
        return held


class Sequence:
    """One choice of a request while it is being generated.

    Args:
      request: The request.
      choice: The index of the choice, starting at 0.
      tokenizer: Tokenizer of the model.
      eos_ids: The model's own stop ids.

    Attributes:
      matcher: The matcher of the request's constraint; None if there is no constraint.
      num_tokens: Number of tokens generated so far.
    """

    def __init__(self, request: Request, choice: int, tokenizer: Tokenizer, eos_ids: Iterable[int]):
        self.request, self.choice = request, choice
        self._stop_ids = frozenset(request.stop_ids(eos_ids))
        self.matcher = request.matchers[choice] if request.matchers else None
        # The clean-up of spaces could change a text so that it no longer meets the constraint.
        keep_spaces = self.matcher is not None
        self._detokenizer = IncrementalDetokenizer(tokenizer, keep_spaces=keep_spaces)
        self._stop_filter = StopStringFilter(request.stop)
        self.num_tokens = 0
        self._num_decoded, self._num_final = 0, 0  # characters before and after the stop filter
        self._text: list[str] = []
        self._logprobs: list[tuple[int, TokenLogprobs]] = []  # each with the start of its text

    def append(self, token: TokenLogprobs) -> FinishReason | None:
        """Add a token, and pass the new text to the request's `on_event`.

        With a constraint, call `check_constraint` to find out whether the token completes the
        answer.

        Returns:
          The reason why the sequence is complete, or None if it is not complete.
        """
        request = self.request
        self.num_tokens += 1
        request.completion_tokens += 1
        if token.token.token_id in self._stop_ids:
            return self._add_text("", "stop")
        if request.top_logprobs is not None:
            self._logprobs.append((self._num_decoded, token))
        reason = None
        if self.matcher is None:
            reason = self._length_reason()
        else:
            self.matcher.advance(token.token.token_id)
        return self._add_text(self._detokenizer.push(token.token.token_id), reason)

    def check_constraint(self) -> FinishReason | None:
        """Wait for the matcher, which must exist, and end the sequence if the answer is complete.

        Returns:
          The reason why the sequence is complete, or None if it is not complete.

        Raises:
          ConstraintError: The constraint became too complex.
        """
        assert self.matcher is not None
        self.matcher.wait()
        reason = "stop" if self.matcher.is_complete else self._length_reason()
        return self._add_text("", reason) if reason else None

    def _length_reason(self) -> FinishReason | None:
        return "length" if self.num_tokens == self.request.max_new_tokens else None

    def _add_text(self, text: str, reason: FinishReason | None) -> FinishReason | None:
        """Add text, and send what can no longer change; a reason ends the sequence."""
        request, stopped = self.request, False
        if reason:
            text += self._detokenizer.finish()
        self._num_decoded += len(text)
        if self.num_tokens > request.min_tokens:
            text, stopped = self._stop_filter.push(text)
        if reason and not stopped:
            text += self._stop_filter.finish()
        self._text.append(text)
        self._num_final += len(text)
        reason = "stop" if stopped else reason
        if reason or (text and request.stream):
            self._send(reason, stopped)
        return reason

    def _send(self, reason: FinishReason | None, stopped: bool) -> None:
        """Send the text that is final, and the tokens whose text starts in this text."""
        end = self._num_final if stopped or reason is None else self._num_decoded + 1
        ready = tuple(token for start, token in self._logprobs if start < end)
        self._logprobs = [(start, token) for start, token in self._logprobs if start >= end]
        text, self._text = "".join(self._text), []
        self.request.on_event(Delta(self.choice, text, ready, reason))
