"""Continuous batching: one decode step serves all sequences; new sequences join between steps.

The device runs one step ahead of the host: the next step is dispatched before the tokens of the
previous one are read. A sequence that has ended is therefore decoded once more.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, cast, get_args

import jax
import numpy as np
from jax import Array
from jaxtyping import Float

from ovis_jax.engine.constraints import ConstraintError
from ovis_jax.engine.prefix_cache import CachedTokens, VisualEmbeddingCache
from ovis_jax.engine.request import EngineError, Failure, Logprob, Request, Sequence, TokenLogprobs
from ovis_jax.engine.runner import ModelRunner
from ovis_jax.engine.state import SampledTokens, SamplingMode, make_sampling_params
from ovis_jax.errors import OvisError
from ovis_jax.inputs.image_processing import IMAGE_SLOT
from ovis_jax.loading import LoadedOvis

DEADLINE_EXCEEDED = Failure("the request took longer than this server allows", "deadline_exceeded")
SHUTTING_DOWN = Failure("this server is shutting down", "shutting_down")
REQUEST_FAILED = Failure("the request failed; the server's log has the details", "request_failed")
ENGINE_FAILED = Failure("the model failed; the server's log has the details", "engine_failed")

PREFILL_SHARE = 2
"""Time for prefill between two decode steps, relative to the time of a decode step."""

MIN_CACHED_TOKENS = 16
"""Minimum length of a common prefix for which a row of the KV cache is copied."""

MAX_VISUAL_CACHE_BYTES = 2**28
"""Maximum size of the visual embeddings that are kept, about 190 crops of the 9B model."""

log = logging.getLogger(__name__)


class QueueFullError(OvisError):
    """Too many requests are waiting."""


@dataclass
class PrefillProgress:
    """The request whose prompt is being prefilled, and its progress.

    Attributes:
      request: The request.
      reused_slot: The slot whose cache the prompt continues; None if it starts from position 0.
      num_crops_encoded: Number of crops that are encoded, or in the reused cache.
      num_tokens_read: Number of prompt positions in the cache.
      logits: Logits at the prompt's last position; None until the whole prompt is prefilled.
      num_choices_started: Number of choices whose generation has started.
    """

    request: Request
    reused_slot: int | None = None
    num_crops_encoded: int = 0
    num_tokens_read: int = 0
    logits: Float[Array, "1 V"] | None = None
    num_choices_started: int = 0


@dataclass
class Slot:
    """A row of the decode state.

    Attributes:
      sequence: The sequence that is being generated; None if the slot is free.
      cached: The tokens in the row's cache, also of a sequence that has ended.
      last_used: When the sequence started, as a count of all sequences.
    """

    sequence: Sequence | None = None
    cached: CachedTokens = field(default_factory=lambda: CachedTokens(np.zeros(0, np.int32), (), 0))
    last_used: int = 0

    @property
    def num_dispatched(self) -> int:
        """Number of tokens that are sampled or being sampled: one by prefill, one per step."""
        return self.cached.num_cached - self.cached.num_prompt + 1


class SampledStep(NamedTuple):
    """The tokens of a step, which the device may still be computing."""

    tokens: SampledTokens
    rows: list[tuple[int, Slot, Sequence]]
    """Row of the tokens, and the slot and the sequence that the row belongs to."""


class Scheduler:
    """Decides what the model runs next, in a separate thread.

    Prompts are prefilled in order of arrival. Between two decode steps, the thread runs at least
    one prefill step, and more as long as they do not exceed `max_num_batched_tokens`. Running
    sequences therefore never wait for a whole prompt.

    The mask of a sequence with a constraint depends on its last token. Such a sequence therefore
    joins every second decode step, if its mask is ready by then. The others never wait for a mask.

    Args:
      ovis: The model.
      runner: Programs compiled for the model; several schedulers may share one runner.
      max_queued_requests: Maximum number of waiting requests.
      max_num_batched_tokens: Maximum number of prompt positions between two decode steps while
        sequences are running. A crop counts as `ModelRunner.crop_cost` positions. The default is
        what takes as long as `PREFILL_SHARE` decode steps.
      enable_prefix_caching: Whether to reuse the KV cache and the visual embeddings of earlier
        requests.

    Attributes:
      processor: Processor of the model.
      max_model_len: Maximum total length of a prompt and its answer, in positions.
      max_num_seqs: Maximum number of concurrent sequences.
      reuses_requests: Whether earlier requests are reused.
      visual_embeddings: The visual embeddings of earlier requests.
      changed: Condition variable that is notified after every change to a request or to the
        scheduler.
    """

    def __init__(
        self,
        ovis: LoadedOvis,
        runner: ModelRunner,
        *,
        max_queued_requests: int,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool = True,
    ):
        self.processor, self._eos_ids = ovis.processor, ovis.config.eos_ids
        self.max_model_len, self.max_num_seqs = runner.max_model_len, runner.max_num_seqs
        self.changed = threading.Condition()
        self._runner = runner
        self._state, self._prefill_state = runner.init_decode_state(), runner.init_prefill_state()
        self._max_queued_requests = max_queued_requests
        share = math.ceil(PREFILL_SHARE * runner.positions_per_decode_step)
        self._max_num_batched_tokens = max_num_batched_tokens or share
        # Sampled visual words depend on the seed of a request, so they cannot be reused.
        samples_words = ovis.config.visual_tokenizer.tokenize_function == "gumbel_argmax"
        self.reuses_requests = enable_prefix_caching and not samples_words
        self.visual_embeddings = VisualEmbeddingCache(MAX_VISUAL_CACHE_BYTES)
        self._waiting: deque[Request] = deque()
        self._prefill: PrefillProgress | None = None
        self._slots = [Slot() for _ in range(runner.max_num_seqs)]
        self._unread: deque[SampledStep] = deque()
        self._num_started = 0
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
        return sum(slot.sequence is not None for slot in self._slots)

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
                self._read_tokens(max_unread=1 if self._dispatch_decode() else 0)
            except Exception:  # a device may raise any exception
                log.exception("a step of the model failed")
                self._fail_all()
                self._unread.clear()
                self._slots = [Slot() for _ in self._slots]
                self.visual_embeddings.clear()
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

    def _fail(self, request: Request) -> None:
        """Fail the request that caused the current exception."""
        log.exception("a request failed; the others continue")
        _send_failure(self._remove(lambda other: other is request), REQUEST_FAILED)

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
        for slot in self._slots:
            if slot.sequence and matches(slot.sequence.request):
                removed.append(slot.sequence.request)
                slot.sequence = None
        return removed

    def _advance_prefill(self) -> None:
        """Run prefill steps within the budget, at least one, and start sequences that are ready."""
        num_positions = 0
        while True:
            if self._prefill is None:
                with self.changed:
                    if not self._waiting:
                        return
                    request = self._waiting.popleft()
                self._prefill = self._begin_prefill(request)
            prefill = self._prefill
            if prefill.logits is None:
                cost = self._step_cost(prefill)
                too_long = num_positions + cost > self._max_num_batched_tokens
                if num_positions and self.num_running and too_long:
                    return
                self._run_prefill_step(prefill)
                num_positions += cost
            if prefill.logits is not None:
                self._start_sequences(prefill, prefill.logits)
                if self._prefill and prefill.num_choices_started < prefill.request.num_choices:
                    return  # all slots are in use
                self._prefill = None

    def _begin_prefill(self, request: Request) -> PrefillProgress:
        """Find the slot with the longest common prefix, and copy its cache."""
        best, length = 0, 0
        for number, slot in enumerate(self._slots):
            if self.reuses_requests:
                common = slot.cached.common_prefix(
                    request.tokens,
                    request.crop_digests,
                    self._runner.tokens_per_crop,
                    self._runner.ring_slots,
                )
                best, length = (number, common) if common > length else (best, length)
        if length < MIN_CACHED_TOKENS:
            return PrefillProgress(request)
        request.cached_tokens = length
        self._prefill_state = self._runner.run_reuse(self._prefill_state, self._state, best)
        visual_tokens = int(np.count_nonzero(request.tokens[:length] == IMAGE_SLOT))
        request.cached_crops = visual_tokens // self._runner.tokens_per_crop
        return PrefillProgress(request, best, request.cached_crops, length)

    def _step_cost(self, prefill: PrefillProgress) -> int:
        """Return the cost of the next prefill step, in positions."""
        has_crops = prefill.num_crops_encoded < len(prefill.request.pixels)
        return self._runner.crop_cost if has_crops else self._runner.chunk_size

    def _run_prefill_step(self, prefill: PrefillProgress) -> None:
        """Encode the next crop or, once all crops are encoded, prefill the next chunk."""
        request, runner = prefill.request, self._runner
        while prefill.num_crops_encoded < len(request.pixels):
            crop = prefill.num_crops_encoded
            digest = request.crop_digests[crop] if self.reuses_requests else None
            embeddings = cached = self.visual_embeddings.get(digest) if digest else None
            if embeddings is None:
                embeddings = runner.run_encoder(request.pixels[crop], crop, request.seed)
                if digest:
                    self.visual_embeddings.put(digest, embeddings)
            self._prefill_state = runner.run_add_visual(self._prefill_state, embeddings, crop)
            prefill.num_crops_encoded += 1
            if cached is None:
                return
            request.cached_crops += 1
        self._prefill_state, logits = runner.run_prefill(
            self._prefill_state, request.tokens, prefill.num_tokens_read
        )
        prefill.num_tokens_read += runner.chunk_size
        if prefill.num_tokens_read >= len(request.tokens):
            prefill.logits = logits

    def _start_sequences(self, prefill: PrefillProgress, logits: Float[Array, "1 V"]) -> None:
        """Start as many of a request's choices as there are free slots."""
        request, tokenizer = prefill.request, self.processor.tokenizer
        for number in self._free_slots(prefill):
            if prefill.num_choices_started == request.num_choices:
                return
            choice, slot = prefill.num_choices_started, self._slots[number]
            try:
                params = make_sampling_params(
                    request.sampling,
                    request.seed,
                    choice,
                    logit_bias=request.logit_bias,
                    stop_ids=request.stop_ids(self._eos_ids),
                    min_tokens=request.min_tokens,
                )
            except Exception:  # for example, a token id that is not an int32
                self._fail(request)
                return
            mask = request.matchers[choice].mask if request.matchers else None
            self._state, sampled = self._runner.run_insert(
                self._state, number, self._prefill_state, logits, params, mask
            )
            slot.sequence = Sequence(request, choice, tokenizer, self._eos_ids)
            digests = request.crop_digests if self.reuses_requests else ()
            slot.cached = CachedTokens(request.tokens, digests, self.max_model_len)
            self._num_started += 1
            slot.last_used = self._num_started
            prefill.num_choices_started += 1
            self._unread.append(SampledStep(sampled, [(0, slot, slot.sequence)]))

    def _free_slots(self, prefill: PrefillProgress) -> list[int]:
        """Return the free slots, those whose cache is least likely to be reused first.

        The first one is the slot that a prompt continues, if most of its cache is in the prompt.
        """

        def order(number: int) -> tuple[bool, int]:
            slot = self._slots[number]
            continues = (
                number == prefill.reused_slot
                and 2 * prefill.request.cached_tokens >= slot.cached.num_cached
            )
            return not continues, slot.last_used

        return sorted((n for n, slot in enumerate(self._slots) if not slot.sequence), key=order)

    def _dispatch_decode(self) -> bool:
        """Start to generate a token for running sequences; return whether there are any."""
        rows = self._next_rows()
        if not rows:
            return False
        active = np.zeros(self.max_num_seqs, bool)
        active[[number for number, _, _ in rows]] = True
        modes = [_sampling_mode(sequence.request) for _, _, sequence in rows]
        mode = cast(SamplingMode, max(modes, key=get_args(SamplingMode).index))
        matchers = [(number, sequence.matcher) for number, _, sequence in rows if sequence.matcher]
        masks = None
        if matchers:
            masks = self._runner.allow_all()
            for number, matcher in matchers:
                masks[number] = matcher.mask
        self._state, sampled = self._runner.run_decode(self._state, active, mode, masks)
        for _, slot, _ in rows:
            slot.cached.num_cached += 1
        self._unread.append(SampledStep(sampled, rows))
        return True

    def _next_rows(self) -> list[tuple[int, Slot, Sequence]]:
        """Return the rows of the next step; end the sequences whose constraint says so."""
        running = [
            (number, slot, slot.sequence)
            for number, slot in enumerate(self._slots)
            if slot.sequence is not None
        ]
        unconstrained = any(sequence.matcher is None for _, _, sequence in running)
        prefilling = self._prefill is not None and self._prefill.logits is None
        waits = not (unconstrained or prefilling or self._unread)  # there is nothing else to do
        rows = []
        for number, slot, sequence in running:
            if sequence.matcher is None:
                if slot.num_dispatched < sequence.request.max_new_tokens:
                    rows.append((number, slot, sequence))
            elif (
                slot.num_dispatched == sequence.num_tokens  # the mask depends on all tokens
                and (sequence.matcher.is_ready or waits)
                and slot.sequence is sequence  # another choice of the request may have failed
                and not self._check_constraint(slot, sequence)
            ):
                rows.append((number, slot, sequence))
        return [row for row in rows if row[1].sequence is row[2]]

    def _check_constraint(self, slot: Slot, sequence: Sequence) -> bool:
        """Free the slot if the constraint says that its sequence is complete; return whether."""
        try:
            if sequence.check_constraint():
                self._end_sequence(slot, sequence)
        except ConstraintError as error:
            failed = self._remove(lambda request: request is sequence.request)
            failure = Failure(str(error), "constraint_too_complex", error.name)
            _send_failure(failed, failure)
        return slot.sequence is None

    def _read_tokens(self, max_unread: int) -> None:
        """Wait for steps, oldest first, and add their tokens to the sequences."""
        while len(self._unread) > max_unread:
            sampled, rows = self._unread.popleft()
            sampled = jax.device_get(sampled)
            for row, slot, sequence in rows:
                if slot.sequence is sequence:  # it has not ended in the step before
                    self._append_token(slot, sequence, sampled, row)

    def _append_token(
        self, slot: Slot, sequence: Sequence, sampled: SampledTokens, row: int
    ) -> None:
        """Add a row's token to the sequence in a slot, and free the slot after the last token."""
        request = sequence.request
        request.first_token_time = request.first_token_time or time.monotonic()
        token = Logprob(int(sampled.tokens[row]), float(sampled.logprobs[row]))
        slot.cached.append(token.token_id)
        top = ()
        if request.top_logprobs and sampled.top is not None:
            ids, logprobs = (x[row][: request.top_logprobs].tolist() for x in sampled.top)
            # A constraint may allow fewer tokens.
            top = tuple(Logprob(i, x) for i, x in zip(ids, logprobs, strict=True) if x > -math.inf)
        try:
            finish_reason = sequence.append(TokenLogprobs(token, top))
        except Exception:  # for example, the tokenizer has fewer ids than the model
            self._fail(request)
            return
        if finish_reason:
            self._end_sequence(slot, sequence)

    def _end_sequence(self, slot: Slot, sequence: Sequence) -> None:
        """Free the slot of a sequence that is complete."""
        slot.sequence = None
        sequence.request.num_unfinished -= 1


@contextmanager
def run_engine(
    ovis: LoadedOvis,
    *,
    max_num_seqs: int,
    max_model_len: int,
    chunk_size: int = 128,
    max_queued_requests: int = 64,
    max_num_batched_tokens: int | None = None,
    enable_prefix_caching: bool = True,
    supports_constraints: bool = True,
) -> Iterator[Scheduler]:
    """Compile the programs of a model, and run a scheduler until the block ends.

    Args:
      ovis: The model.
      max_num_seqs: Maximum number of concurrent sequences.
      max_model_len: Maximum total length of a prompt and its answer, in positions.
      chunk_size: Number of prompt positions per prefill step.
      max_queued_requests: Maximum number of waiting requests.
      max_num_batched_tokens: Maximum number of prompt positions between two decode steps, as
        described in `Scheduler`.
      enable_prefix_caching: Whether to reuse the KV cache and the visual embeddings of earlier
        requests.
      supports_constraints: Whether to compile the programs for requests with a constraint, too.
    """
    runner = ModelRunner(
        ovis.model,
        ovis.params,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        chunk_size=chunk_size,
        supports_constraints=supports_constraints,
    )
    scheduler = Scheduler(
        ovis,
        runner,
        max_queued_requests=max_queued_requests,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
    )
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
