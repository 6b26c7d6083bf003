"""Continuous batching: one decode step serves all sequences; new sequences join between steps."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
from jax import Array
from jaxtyping import Float

from ovis_jax.engine.constraints import ConstraintError
from ovis_jax.engine.request import EngineError, Failure, Logprob, Request, Sequence, TokenLogprobs
from ovis_jax.engine.runner import ModelRunner
from ovis_jax.engine.state import SampledTokens, SamplingMode, make_sampling_params
from ovis_jax.errors import OvisError
from ovis_jax.loading import LoadedOvis

DEADLINE_EXCEEDED = Failure("the request took longer than this server allows", "deadline_exceeded")
SHUTTING_DOWN = Failure("this server is shutting down", "shutting_down")
ENGINE_FAILED = Failure("the model failed; the server's log has the details", "engine_failed")

log = logging.getLogger(__name__)


class QueueFullError(OvisError):
    """Too many requests are waiting."""


@dataclass
class PrefillProgress:
    """The request whose prompt is being prefilled, and its progress.

    Attributes:
      request: The request.
      num_crops_encoded: Number of crops encoded.
      num_tokens_read: Number of prompt positions prefilled.
      logits: Logits at the prompt's last position; None until the whole prompt is prefilled.
      num_choices_started: Number of choices whose generation has started.
    """

    request: Request
    num_crops_encoded: int = 0
    num_tokens_read: int = 0
    logits: Float[Array, "1 V"] | None = None
    num_choices_started: int = 0


class Scheduler:
    """Decides what the model runs next, in a separate thread.

    Prompts are prefilled in order of arrival. Between two decode steps, the thread runs one prefill
    step per free slot, and at least one. Running sequences therefore never wait for a whole prompt,
    and free slots fill up quickly.

    Sequences with a constraint join every second decode step, if their masks are ready by then. The
    others never wait for a mask. If all running sequences have a constraint, they join every step.

    Args:
      ovis: The model.
      runner: Programs compiled for the model; several schedulers may share one runner.
      max_queued_requests: Maximum number of waiting requests.

    Attributes:
      processor: Processor of the model.
      max_model_len: Maximum total length of a prompt and its answer, in positions.
      max_num_seqs: Maximum number of concurrent sequences.
      changed: Condition variable that is notified after every change to a request or to the
        scheduler.
    """

    def __init__(self, ovis: LoadedOvis, runner: ModelRunner, *, max_queued_requests: int):
        self.processor, self._eos_ids = ovis.processor, ovis.config.eos_ids
        self.max_model_len, self.max_num_seqs = runner.max_model_len, runner.max_num_seqs
        self.changed = threading.Condition()
        self._runner = runner
        self._state, self._prefill_state = runner.init_decode_state(), runner.init_prefill_state()
        self._max_queued_requests = max_queued_requests
        self._waiting: deque[Request] = deque()
        self._prefill: PrefillProgress | None = None
        self._sequences: list[Sequence | None] = [None] * runner.max_num_seqs
        self._constrained_step = False  # whether sequences with a constraint joined the last step
        self._closing, self._abort, self._failed = False, False, False
        self._thread = threading.Thread(target=self._run, name="ovis-engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Number of requests whose prompt has not been fully prefilled."""
        return len(self._waiting) + (self._prefill is not None)

    @property
    def num_running(self) -> int:
        """Number of sequences that are being generated."""
        return sum(sequence is not None for sequence in self._sequences)

    @property
    def failure(self) -> Failure | None:
        """The reason why no more requests are accepted; None while requests are accepted."""
        return ENGINE_FAILED if self._failed else SHUTTING_DOWN if self._closing else None

    def check_accepting(self) -> None:
        """Check that `submit` would accept a request now.

        Raises:
          QueueFullError: Too many requests are waiting.
          EngineError: The engine is shutting down, or the model can no longer run.
        """
        if self.failure:
            raise EngineError(self.failure)
        if len(self._waiting) >= self._max_queued_requests:
            raise QueueFullError(
                f"{len(self._waiting)} requests are waiting, the maximum; try again later"
            )

    def submit(self, request: Request) -> None:
        """Add a request to the queue.

        Raises:
          QueueFullError: Too many requests are waiting.
          EngineError: The engine is shutting down, or the model can no longer run.
        """
        with self.changed:
            self.check_accepting()
            self._waiting.append(request)
            self.changed.notify_all()

    def abort(self, request: Request) -> None:
        """Drop a request without another event; its slots become free after the current step."""
        with self.changed:
            request.aborted = True
            self.changed.notify_all()

    def close(self, timeout: float) -> None:
        """Accept no more requests, finish the existing requests, and stop.

        Args:
          timeout: Time in seconds after which unfinished requests fail.
        """
        with self.changed:
            self._closing = True
            self.changed.notify_all()
        self._thread.join(timeout)
        with self.changed:
            self._abort = True
            self.changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._drop_expired()
                self._advance_prefill()
                self._decode()
            except Exception:  # a device may raise any exception
                log.exception("a step of the model failed")
                self._fail_all()
                try:  # the failed step may have consumed the donated state
                    self._state = self._runner.init_decode_state()
                    self._prefill_state = self._runner.init_prefill_state()
                except Exception:
                    log.exception("the model cannot run any more")
                    with self.changed:
                        self._failed = True
                        self.changed.notify_all()
                    self._fail_all()
                    return

    def _wait_for_work(self) -> bool:
        """Block until there is work; return False if the engine is closing and no work is left."""
        with self.changed:
            self.changed.notify_all()  # reports the changes from the previous step
            while not (self.num_waiting or self.num_running):
                if self._closing:
                    return False
                self.changed.wait()
            return True

    def _drop_expired(self) -> None:
        """Drop requests that were aborted or are past their deadline."""
        now = math.inf if self._abort else time.monotonic()
        expired = self._remove(lambda request: request.aborted or now >= request.deadline)
        _send_failure(expired, SHUTTING_DOWN if self._abort else DEADLINE_EXCEEDED)

    def _fail_all(self) -> None:
        _send_failure(self._remove(lambda request: True), ENGINE_FAILED)

    def _remove(self, matches: Callable[[Request], bool]) -> list[Request]:
        """Remove requests that match from the queue, the prefill and the slots, and return them."""
        with self.changed:
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
        """Run one prefill step per free slot, at least one, and start sequences that are ready."""
        for _ in range(max(1, self.max_num_seqs - self.num_running)):
            if self._prefill is None:
                with self.changed:
                    if not self._waiting:
                        return
                    self._prefill = PrefillProgress(self._waiting.popleft())
            prefill = self._prefill
            if prefill.logits is None:
                self._run_prefill_step(prefill)
            if prefill.logits is not None:
                self._start_sequences(prefill, prefill.logits)
                if prefill.num_choices_started < prefill.request.num_choices:
                    return  # all slots are in use
                self._prefill = None

    def _run_prefill_step(self, prefill: PrefillProgress) -> None:
        """Encode the next crop or, once all crops are encoded, prefill the next chunk."""
        request, runner = prefill.request, self._runner
        if prefill.num_crops_encoded < len(request.pixels):
            crop = prefill.num_crops_encoded
            self._prefill_state = runner.run_encoder(
                self._prefill_state, request.pixels[crop], crop, request.seed
            )
            prefill.num_crops_encoded += 1
            return
        self._prefill_state, logits = runner.run_prefill(
            self._prefill_state, request.tokens, prefill.num_tokens_read
        )
        prefill.num_tokens_read += runner.chunk_size
        if prefill.num_tokens_read >= len(request.tokens):
            prefill.logits = logits

    def _start_sequences(self, prefill: PrefillProgress, logits: Float[Array, "1 V"]) -> None:
        """Start as many of a request's choices as there are free slots."""
        request, tokenizer = prefill.request, self.processor.tokenizer
        for slot, taken in enumerate(self._sequences):
            if taken is not None or prefill.num_choices_started == request.num_choices:
                continue
            choice = prefill.num_choices_started
            params = make_sampling_params(
                request.sampling,
                request.seed,
                choice,
                logit_bias=request.logit_bias,
                stop_ids=request.stop_ids(self._eos_ids),
                min_tokens=request.min_tokens,
            )
            mask = request.matchers[choice].mask if request.matchers else None
            self._state, sampled = self._runner.run_insert(
                self._state, slot, self._prefill_state, logits, params, mask
            )
            request.first_token_time = request.first_token_time or time.monotonic()
            self._sequences[slot] = Sequence(request, choice, tokenizer, self._eos_ids)
            prefill.num_choices_started += 1
            self._append_token(slot, sampled, row=0)

    def _decode(self) -> None:
        """Generate one token for the running sequences that are in the next step."""
        sequences = self._next_sequences()
        if not sequences:
            return
        active = np.zeros(self.max_num_seqs, bool)
        active[[*sequences]] = True
        modes = [_sampling_mode(sequence.request) for sequence in sequences.values()]
        mode = cast(SamplingMode, max(modes, key=get_args(SamplingMode).index))
        masks = self._runner.allow_all() if self._constrained_step else None
        for slot, sequence in sequences.items():
            if masks is not None and sequence.matcher:
                masks[slot] = sequence.matcher.mask
        self._state, sampled = self._runner.run_decode(self._state, active, mode, masks)
        for slot in sequences:
            self._append_token(slot, sampled, row=slot)

    def _next_sequences(self) -> dict[int, Sequence]:
        """Return the sequences of the next step by slot; end those whose constraint says so."""
        running = {slot: x for slot, x in enumerate(self._sequences) if x is not None}
        unconstrained = any(x.matcher is None for x in running.values())
        prefilling = self._prefill is not None and self._prefill.logits is None
        waits = not (unconstrained or prefilling)  # there is nothing else to do
        ready = {
            slot: x
            for slot, x in running.items()
            if x.matcher is None or x.matcher.is_ready or waits
        }
        for slot, sequence in ready.items():
            if sequence.matcher is None or self._sequences[slot] is not sequence:
                continue  # unconstrained, or another choice of the request has just failed
            try:
                if sequence.check_constraint():
                    self._free_slot(slot)
            except ConstraintError as error:
                failed = self._remove(lambda request, of=sequence.request: request is of)
                failure = Failure(str(error), "constraint_too_complex", error.name)
                _send_failure(failed, failure)
        joins = not (unconstrained and self._constrained_step)
        sequences = {
            slot: x
            for slot, x in ready.items()
            if x is self._sequences[slot] and (x.matcher is None or joins)
        }
        self._constrained_step = any(x.matcher for x in sequences.values())
        return sequences

    def _append_token(self, slot: int, sampled: SampledTokens, row: int) -> None:
        """Add a row's token to the sequence in a slot, and free the slot after the last token."""
        sequence = self._sequences[slot]
        assert sequence is not None
        request = sequence.request
        token = Logprob(int(sampled.tokens[row]), float(sampled.logprobs[row]))
        top = ()
        if request.top_logprobs and sampled.top is not None:
            ids, logprobs = (x[row][: request.top_logprobs].tolist() for x in sampled.top)
            # A constraint may allow fewer tokens.
            top = tuple(Logprob(i, x) for i, x in zip(ids, logprobs, strict=True) if x > -math.inf)
        if sequence.append(TokenLogprobs(token, top)):
            self._free_slot(slot)

    def _free_slot(self, slot: int) -> None:
        """Free the slot of a sequence that is complete."""
        sequence, self._sequences[slot] = self._sequences[slot], None
        assert sequence is not None
        sequence.request.num_unfinished -= 1


@contextmanager
def run_engine(
    ovis: LoadedOvis,
    *,
    max_num_seqs: int,
    max_model_len: int,
    chunk_size: int = 128,
    max_queued_requests: int = 64,
) -> Iterator[Scheduler]:
    """Compile the programs of a model, and run a scheduler until the block ends.

    Args:
      ovis: The model.
      max_num_seqs: Maximum number of concurrent sequences.
      max_model_len: Maximum total length of a prompt and its answer, in positions.
      chunk_size: Number of prompt positions per prefill step.
      max_queued_requests: Maximum number of waiting requests.
    """
    runner = ModelRunner(
        ovis.model,
        ovis.params,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        chunk_size=chunk_size,
    )
    scheduler = Scheduler(ovis, runner, max_queued_requests=max_queued_requests)
    try:
        yield scheduler
    finally:
        scheduler.close(timeout=0.0)


def _send_failure(requests: Iterable[Request], failure: Failure) -> None:
    """Send a failure to each request that was not aborted, once per request."""
    for request in requests:
        if not request.aborted:
            request.aborted = True
            request.on_event(failure)


def _sampling_mode(request: Request) -> SamplingMode:
    """Return the cheapest mode that supports a request's sampling parameters."""
    sampling = request.sampling
    drawn = bool(sampling.temperature)
    filtered = drawn and sampling.has_filters
    adjusted = sampling.needs_counts or request.logit_bias or request.min_tokens
    if request.top_logprobs or filtered or adjusted:
        return "full"
    return "temperature" if drawn else "greedy"
