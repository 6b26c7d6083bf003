"""Continuous batching: one decode step serves all sequences, and new ones join between steps."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
from jax import Array
from jaxtyping import Float

from ovis_jax.engine.request import Failure, Logprob, Request, Sequence, TokenLogprobs
from ovis_jax.engine.runner import ModelRunner
from ovis_jax.engine.state import SampledTokens, SamplingMode, make_sampling_params
from ovis_jax.errors import OvisError, RequestError
from ovis_jax.loading import LoadedOvis

DEADLINE_EXCEEDED = Failure("the request took longer than this server allows", "deadline_exceeded")
SHUTTING_DOWN = Failure("this server is shutting down", "shutting_down")
ENGINE_FAILED = Failure("the model failed; the server's log has the details", "engine_failed")

log = logging.getLogger(__name__)


class QueueFullError(OvisError):
    """Too many requests are waiting."""


class EngineClosedError(OvisError):
    """The engine accepts no more requests.

    Args:
      failure: The reason.
    """

    def __init__(self, failure: Failure):
        super().__init__(failure.message)
        self.failure = failure


@dataclass
class PrefillProgress:
    """The request whose prompt is being read, and how far.

    Attributes:
      request: The request.
      num_crops: Number of crops encoded.
      num_tokens: Number of prompt positions read.
      logits: Logits of the prompt's last position, once it has been read.
      num_started: Number of choices whose generation has started.
    """

    request: Request
    num_crops: int = 0
    num_tokens: int = 0
    logits: Float[Array, "1 V"] | None = None
    num_started: int = 0


class Scheduler:
    """Decides what the model runs next, in a thread of its own.

    Requests are read in order of arrival. Between two decode steps the thread runs one step of
    prefill, or as many as there are free slots: running sequences never wait for a whole prompt,
    and idle slots fill up fast.

    Args:
      ovis: The model.
      runner: Programs compiled for the model; schedulers may share them.
      max_queued_requests: Maximum number of waiting requests.

    Raises:
      RequestError: `max_queued_requests` is below 1.
    """

    def __init__(self, ovis: LoadedOvis, runner: ModelRunner, *, max_queued_requests: int):
        if max_queued_requests < 1:
            raise RequestError(f"max_queued_requests is {max_queued_requests}, expected at least 1")
        self.max_model_len, self.max_num_seqs = runner.max_model_len, runner.max_num_seqs
        self._tokenizer, self._eos_ids = ovis.processor.tokenizer, ovis.config.eos_ids
        self._runner = runner
        self._state, self._prefill_state = runner.init_decode_state(), runner.init_prefill_state()
        self._max_queued_requests = max_queued_requests
        self._waiting: deque[Request] = deque()
        self._prefill: PrefillProgress | None = None
        self._sequences: list[Sequence | None] = [None] * runner.max_num_seqs
        self._wake = threading.Condition()
        self._closing, self._abort, self._failed = False, False, False
        self._thread = threading.Thread(target=self._run, name="ovis-engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Number of requests whose prompt has not been read."""
        return len(self._waiting) + (self._prefill is not None)

    @property
    def num_running(self) -> int:
        """Number of sequences that are being generated."""
        return sum(sequence is not None for sequence in self._sequences)

    @property
    def failure(self) -> Failure | None:
        """The reason why no more requests are accepted; None while they are."""
        return ENGINE_FAILED if self._failed else SHUTTING_DOWN if self._closing else None

    def check_accepting(self) -> None:
        """Check that `submit` would accept a request now.

        Raises:
          QueueFullError: Too many requests are waiting.
          EngineClosedError: The engine is shutting down, or the model can no longer run.
        """
        if self.failure:
            raise EngineClosedError(self.failure)
        if len(self._waiting) >= self._max_queued_requests:
            raise QueueFullError(
                f"{len(self._waiting)} requests are waiting, the maximum; try again later"
            )

    def submit(self, request: Request) -> None:
        """Add a request to the queue.

        Raises:
          QueueFullError: Too many requests are waiting.
          EngineClosedError: The engine is shutting down, or the model can no longer run.
        """
        with self._wake:
            self.check_accepting()
            self._waiting.append(request)
            self._wake.notify()

    def abort(self, request: Request) -> None:
        """Drop a request without another event; its slots are free after the current step."""
        request.aborted = True

    def close(self, timeout: float) -> None:
        """Accept no more requests, finish those there are, and stop.

        Args:
          timeout: Seconds after which unfinished requests fail.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)
        self._abort = True
        self._thread.join()

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._drop_expired()
                self._advance_prefill()
                self._decode()
            except Exception:  # a device may raise anything
                log.exception("a step of the model failed")
                self._fail_all()
                try:  # the failed step may have consumed the donated state
                    self._state = self._runner.init_decode_state()
                    self._prefill_state = self._runner.init_prefill_state()
                except Exception:
                    log.exception("the model cannot run any more")
                    with self._wake:
                        self._failed = True
                    self._fail_all()
                    return

    def _wait_for_work(self) -> bool:
        """Block until there is work; return False if the engine is closing and has none."""
        with self._wake:
            while not (self._waiting or self._prefill or self.num_running):
                if self._closing:
                    return False
                self._wake.wait()
            return True

    def _drop_expired(self) -> None:
        """Drop requests that were aborted or are past their deadline."""
        now = math.inf if self._abort else time.monotonic()
        expired = self._remove(lambda request: request.aborted or now >= request.deadline)
        _send_failure(expired, SHUTTING_DOWN if self._abort else DEADLINE_EXCEEDED)

    def _fail_all(self) -> None:
        _send_failure(self._remove(lambda request: True), ENGINE_FAILED)

    def _remove(self, matches: Callable[[Request], bool]) -> list[Request]:
        """Remove matching requests from the queue, the prefill and the slots, and return them."""
        with self._wake:
            removed = [request for request in self._waiting if matches(request)]
            self._waiting = deque(request for request in self._waiting if not matches(request))
        if self._prefill and matches(self._prefill.request):
            removed.append(self._prefill.request)
            self._prefill = None
        for slot, sequence in enumerate(self._sequences):
            if sequence and matches(sequence.request):
                removed.append(sequence.request)
                self._sequences[slot] = None
        return removed

    def _advance_prefill(self) -> None:
        """Run a step of prefill per free slot, at least one, and start what was read."""
        for _ in range(max(1, self.max_num_seqs - self.num_running)):
            if self._prefill is None:
                with self._wake:
                    if not self._waiting:
                        return
                    self._prefill = PrefillProgress(self._waiting.popleft())
            prefill = self._prefill
            if prefill.logits is None:
                self._run_prefill_step(prefill)
            if prefill.logits is not None:
                self._start_sequences(prefill, prefill.logits)
                if prefill.num_started < prefill.request.num_choices:
                    return  # all slots are taken
                self._prefill = None

    def _run_prefill_step(self, prefill: PrefillProgress) -> None:
        """Encode the next crop, or read the next chunk once all crops are encoded."""
        request, runner = prefill.request, self._runner
        if prefill.num_crops < len(request.pixels):
            crop = prefill.num_crops
            self._prefill_state = runner.run_encoder(
                self._prefill_state, request.pixels[crop], crop, request.seed
            )
            prefill.num_crops += 1
            return
        self._prefill_state, logits = runner.run_prefill(
            self._prefill_state, request.tokens, prefill.num_tokens
        )
        prefill.num_tokens += runner.chunk_size
        if prefill.num_tokens >= len(request.tokens):
            prefill.logits = logits

    def _start_sequences(self, prefill: PrefillProgress, logits: Float[Array, "1 V"]) -> None:
        """Start as many choices of a request as there are free slots."""
        request = prefill.request
        for slot, taken in enumerate(self._sequences):
            if taken is not None or prefill.num_started == request.num_choices:
                continue
            choice = prefill.num_started
            params = make_sampling_params(request.sampling, request.seed, choice)
            self._state, sampled = self._runner.run_insert(
                self._state, slot, self._prefill_state, logits, params
            )
            request.first_token_time = request.first_token_time or time.monotonic()
            self._sequences[slot] = Sequence(request, choice, self._tokenizer, self._eos_ids)
            prefill.num_started += 1
            self._append_token(slot, sampled, row=0)

    def _decode(self) -> None:
        """Generate one token of every running sequence."""
        active = np.array([sequence is not None for sequence in self._sequences])
        if not active.any():
            return
        modes = [_sampling_mode(sequence.request) for sequence in self._sequences if sequence]
        mode = cast(SamplingMode, max(modes, key=get_args(SamplingMode).index))
        self._state, sampled = self._runner.run_decode(self._state, active, mode)
        for slot in np.flatnonzero(active).tolist():
            self._append_token(slot, sampled, row=slot)

    def _append_token(self, slot: int, sampled: SampledTokens, row: int) -> None:
        """Add a row's token to the sequence in a slot, and free the slot after its last token."""
        sequence = self._sequences[slot]
        assert sequence is not None
        request = sequence.request
        token = Logprob(int(sampled.tokens[row]), float(sampled.logprobs[row]))
        top = ()
        if request.top_logprobs and sampled.top is not None:
            ids, logprobs = (x[row][: request.top_logprobs].tolist() for x in sampled.top)
            top = tuple(map(Logprob, ids, logprobs))
        if sequence.append(TokenLogprobs(token, top)):
            self._sequences[slot] = None
            request.num_unfinished -= 1


def _send_failure(requests: Iterable[Request], failure: Failure) -> None:
    """Send a failure once to each request that was not aborted."""
    for request in requests:
        if not request.aborted:
            request.aborted = True
            request.on_event(failure)


def _sampling_mode(request: Request) -> SamplingMode:
    """Return the cheapest mode that supports a request's options."""
    sampling = request.sampling
    drawn = sampling.temperature is not None and bool(np.any(np.asarray(sampling.temperature) > 0))
    filtered = drawn and (sampling.top_k is not None or sampling.top_p is not None)
    if request.top_logprobs or filtered or sampling.repetition_penalty is not None:
        return "full"
    return "temperature" if drawn else "greedy"
