"""One answer while it is being written: ids become text, which ends before a stop string."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.tokenizer import BYTES, SPACE, TextStream, Tokenizer

Reason = Literal["stop", "length"]


class TokenText(NamedTuple):
    """A token as text, and its log-probability."""

    id: int
    log_prob: float


class Written(NamedTuple):
    """A token of an answer, and the likeliest ones in its place."""

    token: TokenText
    top: tuple[TokenText, ...]


class Piece(NamedTuple):
    """What was added to an answer."""

    choice: int
    text: str
    tokens: tuple[Written, ...]
    """The tokens that wrote it; none where no log-probabilities were asked for."""
    reason: Reason | None
    """Why the answer ends here; None if it goes on."""


class Failed(NamedTuple):
    """Why a request gets no more of its answers."""

    message: str
    code: str


Event = Piece | Failed


@dataclass(eq=False)
class Job:
    """A request as the engine takes it.

    Attributes:
      tokens: int32 [T], not padded; every crop expanded to its slots.
      pixels: float32 [I, h, w, C], its crops.
      sampling: numbers, none of them an array.
      seed: from 0 to 2**64 - 1.
      max_new_tokens: the longest answer, the stop id included.
      deadline: by `time.monotonic`; what is not written then is not written at all.
      emit: called with each event, in the engine's own thread.
      choices: answers asked for.
      stop: texts that end an answer and do not belong to it.
      top: None if no log-probabilities are asked for, else how many of the likeliest tokens.
      whole: whether an answer is to be told of once, when it is complete.
      cancelled: set when nobody wants the answers any more.
      first_token: when the first one was picked, by `time.monotonic`; None before.
      completion_tokens: written so far, of all its answers.
      unfinished: answers that are not complete yet.
    """

    tokens: np.ndarray
    pixels: np.ndarray
    sampling: Sampling
    seed: int
    max_new_tokens: int
    deadline: float
    emit: Callable[[Event], None]
    choices: int = 1
    stop: tuple[str, ...] = ()
    top: int | None = None
    whole: bool = False
    cancelled: bool = False
    first_token: float | None = None
    completion_tokens: int = 0
    unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = self.choices


class StopStrings:
    """Finds the first stop string to be complete in a text that comes in pieces.

    What could still become one is held back. What it gives does not depend on the pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is sure now, and whether a stop string was found; it ends before it."""
        text = self._held + text
        found = [(i + len(stop), i) for stop in self._stops if (i := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], False

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The longest end of a text that is the beginning of a stop string."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)


class Answer:
    """One of a job's answers.

    Args:
      job: the job.
      choice: which of its answers.
      tokenizer: for the text.
      eos_ids: ids that end an answer.
    """

    def __init__(self, job: Job, choice: int, tokenizer: Tokenizer, eos_ids: Sequence[int]):
        self.job, self.choice = job, choice
        self._eos_ids = eos_ids
        self._stream, self._stops = TextStream(tokenizer), StopStrings(job.stop)
        self._tokens = 0
        self._read, self._sent = 0, 0  # characters
        self._text: list[str] = []
        self._written: list[tuple[int, Written]] = []  # where the text of each begins

    def push(self, written: Written) -> Reason | None:
        """Take one more token, and tell of it; gives why the answer is over if it is."""
        self._tokens += 1
        self.job.completion_tokens += 1
        ended = written.token.id in self._eos_ids
        if not ended and self.job.top is not None:
            self._written.append((self._read, written))
        text = "" if ended else self._stream.push(written.token.id)
        over = ended or self._tokens == self.job.max_new_tokens
        if over:
            text += self._stream.finish()
        self._read += len(text)
        text, stopped = self._stops.push(text)
        if over and not stopped:
            text += self._stops.finish()
        reason: Reason | None = "stop" if ended or stopped else "length" if over else None
        self._text.append(text)
        self._sent += len(text)
        if reason or (text and not self.job.whole):
            self._tell(reason, stopped)
        return reason

    def _tell(self, reason: Reason | None, stopped: bool) -> None:
        """Send what is sure, with the tokens whose text begins in it."""
        last = self._sent if stopped or reason is None else self._read + 1
        ready = [written for start, written in self._written if start < last]
        self._written = [pair for pair in self._written if pair[0] >= last]
        text, self._text = "".join(self._text), []
        self.job.emit(Piece(self.choice, text, tuple(ready), reason))


def piece_text(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    """How a token is written, and its bytes; one byte of a longer character is no text alone."""
    piece = tokenizer.pieces[token]
    if piece in BYTES:
        return f"bytes:\\x{BYTES[piece]:02x}", bytes([BYTES[piece]])
    text = piece.replace(SPACE, " ")
    return text, text.encode()
