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
from jaxtyping import Float, Int32

from ovis_jax.engine.constraints import ConstraintError
from ovis_jax.engine.prefix_cache import MAX_VISUAL_CACHE_BYTES, CachedTokens, VisualEmbeddingCache
from ovis_jax.engine.request import EngineError, Failure, Logprob, Request, Sequence, TokenLogprobs
from ovis_jax.engine.runner import Chunk, Crop, ModelRunner, Start
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

MASK_SHARE = 0.25
"""Time to wait for the masks of constraints, relative to the time of a decode step. The device is
busy with the step before, so it does not wait."""

SHRINK_AFTER = 256
"""Number of successive decode steps that must fit into a shorter cache before the cache shrinks."""

MIN_CACHED_TOKENS = 16
"""Minimum length of a common prefix for which a row of the KV cache is copied."""

log = logging.getLogger(__name__)


class QueueFullError(OvisError):
    """Too many requests are waiting."""


@dataclass(eq=False)
class Slot:
    """A row of the decode state.

    Attributes:
      index: The row.
      sequence: The sequence that is being generated, if any.
      is_prefilling: Whether a prompt is being written to the row's cache.
      cached: The tokens in the row's cache, also of a sequence that has ended. While a prompt is
        being written, all of its tokens.
      last_used: When the row was last taken, as a count of all rows taken.
    """

    index: int
    sequence: Sequence | None = None
    is_prefilling: bool = False
    cached: CachedTokens = field(default_factory=lambda: CachedTokens(np.zeros(0, np.int32), (), 0))
    last_used: int = 0

    @property
    def is_free(self) -> bool:
        """Whether a request can take the slot."""
        return self.sequence is None and not self.is_prefilling

    @property
    def num_dispatched(self) -> int:
        """Number of tokens that are sampled or being sampled: one by prefill, one per step."""
        return self.cached.num_cached - self.cached.num_prompt + 1


@dataclass(eq=False)
class PrefillProgress:
    """A prompt that is being prefilled.

    Attributes:
      request: The request.
      slot: The slot whose cache the prompt is written to.
      lane: Index of the lane with the prompt's visual embeddings.
      num_crops_encoded: Number of crops that are encoded, or in the reused cache.
      num_tokens_read: Number of prompt positions in the cache.
    """

    request: Request
    slot: Slot
    lane: int
    num_crops_encoded: int
    num_tokens_read: int

    @property
    def has_crops(self) -> bool:
        """Whether crops are left to encode."""
        return self.num_crops_encoded < len(self.request.pixels)


class SampledStep(NamedTuple):
    """The tokens of a step, which the device may still be computing."""

    tokens: SampledTokens
    rows: list[tuple[int, Slot, Sequence]]
    """Row of the tokens, and the slot and the sequence that the row belongs to."""


class Scheduler:
    """Decides what the model runs next, in a separate thread.

    Prompts are prefilled in order of arrival, as many at a time as the runner has lanes: a prefill
    step encodes a crop, or reads a chunk, of each of them. Between two decode steps, the thread
    runs at least one prefill step, and more as long as they do not exceed `max_num_batched_tokens`.
    Running sequences therefore never wait for a whole prompt.

    The mask of a sequence with a constraint depends on its last token. Such a sequence therefore
    joins every second decode step, if its mask is ready by then. The others wait for masks only
    while the device is busy with the step before, and at most `MASK_SHARE` of a step.

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
      cache_length: The current length of the cache, in positions: long enough for the longest
        sequence, and shorter again after `SHRINK_AFTER` steps that need less.
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
        self.cache_length = runner.cache_lengths[0]
        self._num_short_steps = 0
        self._state = runner.init_decode_state(self.cache_length)
        self._visual = runner.init_visual()
        self._max_queued_requests = max_queued_requests
        share = math.ceil(PREFILL_SHARE * runner.positions_per_decode_step)
        self._max_num_batched_tokens = max_num_batched_tokens or share
        # Sampled visual words depend on the seed of a request, so they cannot be reused.
        samples_words = ovis.config.visual_tokenizer.tokenize_function == "gumbel_argmax"
        self.reuses_requests = enable_prefix_caching and not samples_words
        self.visual_embeddings = VisualEmbeddingCache(MAX_VISUAL_CACHE_BYTES)
        self._waiting: deque[Request] = deque()
        self._prefills: list[PrefillProgress] = []
        self._slots = [Slot(index) for index in range(runner.max_num_seqs)]
        self._unread: deque[SampledStep] = deque()
        self._num_taken = 0
        self._closing, self._abort, self._failed = False, False, False
        self._thread = threading.Thread(target=self._run, name="ovis-engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Number of requests whose prompt has not been fully prefilled."""
        return len(self._waiting) + len(self._prefills)

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
                self._slots = [Slot(slot.index) for slot in self._slots]
                self.visual_embeddings.clear()
                try:  # the failed step may have consumed the donated state
                    self.cache_length = self._runner.cache_lengths[0]
                    self._state = self._runner.init_decode_state(self.cache_length)
                    self._visual = self._runner.init_visual()
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
        for prefill in [x for x in self._prefills if matches(x.request)]:
            removed.append(prefill.request)
            self._end_prefill(prefill)
            read = prefill.request.tokens[: prefill.num_tokens_read]
            prefill.slot.cached = self._cached_tokens(prefill.request, read)
        for slot in self._slots:
            if slot.sequence and matches(slot.sequence.request):
                removed.append(slot.sequence.request)
                slot.sequence = None
        return removed

    def _advance_prefill(self) -> None:
        """Run prefill steps within the budget, at least one, and start sequences that are ready."""
        num_positions = 0
        while True:
            self._begin_prefills()
            if not self._prefills:
                return
            has_crops = self._prefills[0].has_crops
            cost = self._runner.crop_cost if has_crops else self._runner.chunk_size
            allowed = self._runner.max_num_partial_prefills
            if self.num_running:
                remaining = self._max_num_batched_tokens - num_positions
                allowed = min(allowed, max(remaining // cost, num_positions == 0))
            if not allowed:
                return
            run = self._encode_crops if has_crops else self._prefill_chunks
            num_positions += cost * run(allowed)

    def _begin_prefills(self) -> None:
        """Begin to prefill waiting requests while there are free slots and lanes."""
        lanes = self._runner.max_num_partial_prefills
        while len(self._prefills) < lanes and any(slot.is_free for slot in self._slots):
            with self.changed:
                if not self._waiting:
                    return
                request = self._waiting.popleft()
            prefill = self._begin_prefill(request)
            if prefill is None:
                with self.changed:
                    self._waiting.appendleft(request)
                return
            prefill.slot.is_prefilling = True
            self._take(prefill.slot, request)
            self._prefills.append(prefill)
            self._fit_cache(is_step=False)

    def find_prefix(self, request: Request) -> tuple[Slot | None, int]:
        """Return the slot with the longest reusable prefix of a prompt, and the prefix's length.

        If no prefix is worth reusing, the result is None and 0. Other threads may call this for an
        estimate.
        """
        best, length = None, MIN_CACHED_TOKENS - 1
        # A slot that is being prefilled comes last, and is only worth waiting for if it has more.
        for slot in sorted(self._slots, key=lambda slot: slot.is_prefilling):
            if self.reuses_requests:
                common = slot.cached.common_prefix(
                    request.tokens,
                    request.crop_digests,
                    self._runner.tokens_per_crop,
                    self._runner.ring_slots,
                )
                best, length = (slot, common) if common > length else (best, length)
        return best, length if best else 0

    def _begin_prefill(self, request: Request) -> PrefillProgress | None:
        """Choose a slot for a prompt, with a copy of the longest prefix that another slot has.

        Returns:
          The prompt's progress; None if it is better to wait for another prompt's prefix.
        """
        lanes = set(range(self._runner.max_num_partial_prefills))
        lane = min(lanes - {prefill.lane for prefill in self._prefills})
        best, length = self.find_prefix(request)
        if best is None:
            return PrefillProgress(request, self._free_slots()[0], lane, 0, 0)
        if best.is_prefilling:
            return None
        # A slot is continued without a copy if most of its cache is in the prompt.
        target = best if best.is_free and 2 * length >= best.cached.num_cached else None
        target = target or next((x for x in self._free_slots() if x is not best), best)
        if target is not best:
            self._state = self._runner.run_copy(self._state, best.index, target.index)
        visual_tokens = int(np.count_nonzero(request.tokens[:length] == IMAGE_SLOT))
        num_crops = visual_tokens // self._runner.tokens_per_crop
        if not request.num_started:
            request.cached_tokens, request.cached_crops = length, num_crops
        return PrefillProgress(request, target, lane, num_crops, length)

    def _fit_cache(self, *, is_step: bool) -> None:
        """Make the cache long enough for all prompts and for the next step, or shorter again.

        Every slot that is in use needs a position after its last one: in each step, also slots that
        do not advance write to it.

        Args:
          is_step: Whether a decode step follows, which counts for `SHRINK_AFTER`.
        """
        used = [slot.cached.num_cached for slot in self._slots if not slot.is_free]
        required = min(max(used, default=0) + 2, self.max_model_len)
        length = next(x for x in self._runner.cache_lengths if x >= required)
        if length < self.cache_length:
            self._num_short_steps += is_step
        else:
            self._num_short_steps = 0
        if length > self.cache_length or self._num_short_steps >= SHRINK_AFTER:
            self._state = self._runner.resize_cache(self._state, self.cache_length, length)
            self.cache_length, self._num_short_steps = length, 0
            for slot in self._slots:
                if slot.is_free:
                    slot.cached.truncate(length - 1, self._runner.ring_slots)

    def _take(self, slot: Slot, request: Request) -> None:
        """Record that a slot is taken for a request, whose prompt its cache contains or will."""
        slot.cached = self._cached_tokens(request, request.tokens)
        self._num_taken += 1
        slot.last_used = self._num_taken

    def _free_slots(self) -> list[Slot]:
        """Return the free slots, those whose cache is least likely to be reused first."""
        return sorted((x for x in self._slots if x.is_free), key=lambda slot: slot.last_used)

    def _cached_tokens(self, request: Request, tokens: Int32[np.ndarray, "T"]) -> CachedTokens:
        digests = request.crop_digests if self.reuses_requests else ()
        return CachedTokens(tokens, digests, self.max_model_len)

    def _end_prefill(self, prefill: PrefillProgress) -> None:
        """Give back the lane of a prompt, and its slot."""
        self._prefills.remove(prefill)
        prefill.slot.is_prefilling = False

    def _encode_crops(self, max_crops: int) -> int:
        """Encode the next crops of all prompts, oldest prompt first; return their number."""
        crops: list[Crop] = []
        digests: list[bytes | None] = []
        for prefill in self._prefills:
            request = prefill.request
            while prefill.has_crops:
                index = prefill.num_crops_encoded
                digest = request.crop_digests[index] if self.reuses_requests else None
                cached = self.visual_embeddings.get(digest) if digest else None
                if cached is not None:
                    self._visual = self._runner.run_add_visual(
                        self._visual, cached, prefill.lane, index
                    )
                    request.cached_crops += not request.num_started
                elif len(crops) == max_crops or (digest and digest in digests):
                    break  # the crop is encoded, or found in the cache, in the next step
                else:
                    pixels = request.pixels[index]
                    crops.append(Crop(pixels, prefill.lane, index, request.seed))
                    digests.append(digest)
                prefill.num_crops_encoded += 1
        if crops:
            self._visual, embeddings = self._runner.run_encoder(self._visual, crops)
            for digest, values in zip(digests, embeddings, strict=True):
                if digest:
                    self.visual_embeddings.put(digest, values)
        return len(crops)

    def _prefill_chunks(self, max_chunks: int) -> int:
        """Read the next chunk of prompts whose crops are encoded; return the number of chunks."""
        ready = [x for x in self._prefills if not x.has_crops][:max_chunks]
        chunks = [Chunk(x.request.tokens, x.num_tokens_read, x.slot.index, x.lane) for x in ready]
        self._state, logits = self._runner.run_prefill(self._state, self._visual, chunks)
        finished: list[tuple[int, PrefillProgress]] = []
        for row, prefill in enumerate(ready):
            prefill.num_tokens_read += self._runner.chunk_size
            if prefill.num_tokens_read >= len(prefill.request.tokens):
                finished.append((row, prefill))
        self._start_sequences(finished, logits)
        return len(ready)

    def _start_sequences(
        self, prefills: Iterable[tuple[int, PrefillProgress]], logits: Float[Array, "m V"]
    ) -> None:
        """Start the choices of requests whose prompts are prefilled.

        If there are fewer free slots than choices, the request waits for the others again.

        Args:
          prefills: The prompts, and their rows of `logits`.
          logits: The logits at the prompts' last positions.
        """
        starts: list[Start] = []
        started: list[tuple[Slot, Sequence]] = []
        for row, prefill in prefills:
            request = prefill.request
            slots = [prefill.slot, *self._free_slots()]
            for slot in slots[: request.num_choices - request.num_started]:
                start = self._make_start(request, slot.index, row)
                if start is None:
                    break
                if slot is not prefill.slot:
                    self._state = self._runner.run_copy(self._state, prefill.slot.index, slot.index)
                    self._take(slot, request)
                slot.sequence = Sequence(
                    request, request.num_started, self.processor.tokenizer, self._eos_ids
                )
                request.num_started += 1
                starts.append(start)
                started.append((slot, slot.sequence))
            else:
                self._end_prefill(prefill)
                if request.num_started < request.num_choices:
                    with self.changed:
                        self._waiting.appendleft(request)
        for first in range(0, len(starts), len(logits)):
            group = slice(first, first + len(logits))
            self._state, sampled = self._runner.run_start(self._state, logits, starts[group])
            rows = [(row, slot, x) for row, (slot, x) in enumerate(started[group])]
            self._unread.append(SampledStep(sampled, rows))

    def _make_start(self, request: Request, slot: int, row: int) -> Start | None:
        """Return the start of a request's next choice; None if the request fails."""
        choice = request.num_started
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
            return None
        mask = request.matchers[choice].mask if request.matchers else None
        return Start(slot, row, params, mask)

    def _dispatch_decode(self) -> bool:
        """Start to generate a token for running sequences; return whether there are any."""
        rows = self._next_rows()
        if not rows:
            return False
        self._fit_cache(is_step=True)
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
            (slot.index, slot, slot.sequence) for slot in self._slots if slot.sequence is not None
        ]
        unconstrained = any(sequence.matcher is None for _, _, sequence in running)
        waits = not (unconstrained or self._prefills or self._unread)  # there is nothing else to do
        deadline = time.monotonic() + MASK_SHARE * self._runner.decode_seconds
        rows = []
        for number, slot, sequence in running:
            if sequence.matcher is None:
                if slot.num_dispatched < sequence.request.max_new_tokens:
                    rows.append((number, slot, sequence))
            elif (
                slot.num_dispatched == sequence.num_tokens  # the mask depends on all tokens
                and (waits or sequence.matcher.wait_until(deadline))
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
    max_num_partial_prefills: int = 1,
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
      max_num_partial_prefills: Maximum number of prompts that are prefilled at a time. If it is
        more than one, an answer may depend on other requests, because products of more rows are
        rounded differently.
      max_queued_requests: Maximum number of waiting requests.
      max_num_batched_tokens: Maximum number of prompt positions between two decode steps, as
        described in `Scheduler`.
      enable_prefix_caching: Whether to reuse the KV cache and the visual embeddings of earlier
        requests.
      supports_constraints: Whether to compile the programs for requests with a constraint, too.

    Raises:
      OvisError: The programs do not fit the memory of the devices.
    """
    try:
        runner = ModelRunner(
            ovis.model,
            ovis.params,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            chunk_size=chunk_size,
            max_num_partial_prefills=max_num_partial_prefills,
            supports_constraints=supports_constraints,
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OvisError(
            f"{max_num_seqs} sequences of {max_model_len} positions do not fit the memory of the"
            " device beside the model; choose a smaller --max-num-seqs or --max-model-len"
        ) from error
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
