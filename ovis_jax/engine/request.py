"""A request to the engine, and its output: tokens become text that ends before a stop string."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.tokenizer import IncrementalDetokenizer, Tokenizer

FinishReason = Literal["stop", "length"]


class Logprob(NamedTuple):
    """A token id and its log-probability."""

    token_id: int
    logprob: float


class TokenLogprobs(NamedTuple):
    """A generated token and the most likely tokens at its position, with log-probabilities."""

    token: Logprob
    top: tuple[Logprob, ...]


class Delta(NamedTuple):
    """New output of one choice."""

    choice: int
    """The index of the choice, from 0."""
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    """The tokens of the text; empty if the request wants no log-probabilities."""
    finish_reason: FinishReason | None
    """None unless the choice is complete."""


class Failure(NamedTuple):
    """The reason why the engine gave up on a request."""

    message: str
    code: str


@dataclass(eq=False)
class Request:
    """A request to the engine.

    Attributes:
      tokens: Prompt ids, int32 [T], not padded; an image slot per visual token.
      pixels: Crops of the images, float32 [I, h, w, C].
      sampling: Sampling options as plain numbers, not arrays.
      seed: Seed of the sampling, from 0 to 2**64 - 1.
      max_new_tokens: Maximum number of tokens per choice, the stop id included.
      deadline: Time by `time.monotonic()` at which the request fails if it is not complete.
      on_event: Called with each `Delta`, or with one `Failure`, in the engine's thread.
      num_choices: Number of answers to generate.
      stop: Strings that end an answer and are not part of it.
      top_logprobs: Number of most likely tokens to report per token; None for no
        log-probabilities at all.
      stream: Whether to send a `Delta` per piece of text; otherwise one per choice.
      aborted: Whether the request is over for its caller: no more events are sent.
      first_token_time: Time of the first token by `time.monotonic()`, or None.
      completion_tokens: Number of tokens generated so far, over all choices.
      num_unfinished: Number of choices that are not complete.
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
    top_logprobs: int | None = None
    stream: bool = True
    aborted: bool = False
    first_token_time: float | None = None
    completion_tokens: int = 0
    num_unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_unfinished = self.num_choices


class StopStringFilter:
    """Passes text on up to the first stop string, however the text is split into pieces.

    Text that could be the beginning of a stop string is held back.
    """

    def __init__(self, stop: Iterable[str]):
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text.

        Returns:
          The text that is certain now, and whether a stop string was found, in which case the text
          ends before it.
        """
        text = self._held + text
        found = [(i + len(stop), i) for stop in self._stop if (i := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], False

    def finish(self) -> str:
        """Return the text that was held back, at the end of the input."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)


class Sequence:
    """One choice of a request while it is generated.

    Args:
      request: The request.
      choice: The index of the choice, from 0.
      tokenizer: Tokenizer of the model.
      eos_ids: Ids that end a sequence.
    """

    def __init__(self, request: Request, choice: int, tokenizer: Tokenizer, eos_ids: Iterable[int]):
        self.request, self.choice = request, choice
        self._eos_ids = frozenset(eos_ids)
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stop_filter = StopStringFilter(request.stop)
        self._num_tokens = 0
        self._num_decoded, self._num_final = 0, 0  # characters before and after the stop filter
        self._text: list[str] = []
        self._logprobs: list[tuple[int, TokenLogprobs]] = []  # each with the start of its text

    def append(self, token: TokenLogprobs) -> FinishReason | None:
        """Add a token, and send the new text to the request's `on_event`.

        Returns:
          Why the sequence is complete, or None if it is not.
        """
        request = self.request
        self._num_tokens += 1
        request.completion_tokens += 1
        ended = token.token.token_id in self._eos_ids
        if not ended and request.top_logprobs is not None:
            self._logprobs.append((self._num_decoded, token))
        text = "" if ended else self._detokenizer.push(token.token.token_id)
        last = ended or self._num_tokens == request.max_new_tokens
        if last:
            text += self._detokenizer.finish()
        self._num_decoded += len(text)
        text, stopped = self._stop_filter.push(text)
        if last and not stopped:
            text += self._stop_filter.finish()
        self._text.append(text)
        self._num_final += len(text)
        reason: FinishReason | None = "stop" if ended or stopped else "length" if last else None
        if reason or (text and request.stream):
            self._send(reason, stopped)
        return reason

    def _send(self, reason: FinishReason | None, stopped: bool) -> None:
        """Send the final text, and the tokens whose text starts in it."""
        end = self._num_final if stopped or reason is None else self._num_decoded + 1
        ready = tuple(token for start, token in self._logprobs if start < end)
        self._logprobs = [(start, token) for start, token in self._logprobs if start >= end]
        text, self._text = "".join(self._text), []
        self.request.on_event(Delta(self.choice, text, ready, reason))
