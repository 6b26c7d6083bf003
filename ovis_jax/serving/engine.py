"""Continuous batching: one step serves all answers that are being written; others join between."""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import get_args

import numpy as np
from jax import Array

from ovis_jax.errors import OvisError, RequestError
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.image import IMAGE_SLOT
from ovis_jax.loading import LoadedOvis
from ovis_jax.serving.answer import Answer, Failed, Job, TokenText, Written
from ovis_jax.serving.slots import How, Picked, asked
from ovis_jax.serving.steps import Steps

TOO_LATE = Failed("the request took longer than this server allows", "deadline_exceeded")
STOPPED = Failed("this server is shutting down", "shutting_down")
BROKEN = Failed("the model failed on this server; its log says how", "engine_failed")

log = logging.getLogger(__name__)


class QueueFull(OvisError):
    """As many requests wait as the server lets wait."""


class Closed(OvisError):
    """The engine takes no more requests."""


@dataclass
class Reader:
    """How far the reading of a job's prompt has come, then which answer joins next."""

    job: Job
    crop: int = 0
    position: int = 0
    visual: int = 0
    logits: Array | None = None
    choice: int = 0


class Engine:
    """Answers jobs in a thread of its own.

    Between two steps it reads one piece of one prompt for each idle slot, at least one: so reading
    gets the share of slots that have nothing to write, and those that write never wait for a whole
    prompt. Jobs are read in the order they came.

    Args:
      ovis: the model.
      steps: compiled for it; engines may share them.
      queue: jobs that may wait for their turn.
    """

    def __init__(self, ovis: LoadedOvis, steps: Steps, *, queue: int):
        if queue < 1:
            raise RequestError(f"serve: queue is {queue}, expected at least 1")
        self.max_length, self.num_slots = steps.max_length, steps.num_slots
        self._broken = False
        self._tokenizer, self._eos_ids = ovis.processor.tokenizer, ovis.config.eos_ids
        self._steps = steps
        self._slots, self._reading = steps.empty_slots(), steps.empty_reading()
        self._answers: list[Answer | None] = [None] * steps.num_slots
        self._reader: Reader | None = None
        self._queue = queue
        self._waiting: deque[Job] = deque()
        self._wake = threading.Condition()
        self._closing, self._hurry = False, False
        self._thread = threading.Thread(target=self._run, name="ovis-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs whose prompt is not read yet."""
        return len(self._waiting) + (self._reader is not None)

    @property
    def running(self) -> int:
        """Answers that are being written."""
        return sum(answer is not None for answer in self._answers)

    @property
    def full(self) -> bool:
        """Whether `submit` would refuse a job."""
        return len(self._waiting) >= self._queue

    @property
    def over(self) -> Failed | None:
        """Why the engine takes no more jobs; None while it does."""
        return BROKEN if self._broken else STOPPED if self._closing else None

    @property
    def closed(self) -> bool:
        """Whether the engine takes no more jobs."""
        return self.over is not None

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn.

        Raises:
          QueueFull: as many wait as may.
          Closed: the engine is shutting down, or the model cannot run any more.
        """
        with self._wake:
            if self.over:
                raise Closed(self.over.message)
            if self.full:
                raise QueueFull(f"{self._queue} requests are waiting, as many as may; try later")
            self._waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Say that nobody wants a job's answers any more; its slots are free at the next step."""
        job.cancelled = True

    def close(self, timeout: float) -> None:
        """Take no more jobs, finish those that are there, and give up after so many seconds."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)
        self._hurry = True
        self._thread.join()

    def _run(self) -> None:
        while self._wait():
            try:
                self._drop()
                self._read_on()
                self._write()
            except Exception:  # whatever a device may raise
                log.exception("a step of the model failed")
                self._fail(BROKEN)
                try:  # the state was given away to the step that failed
                    self._slots = self._steps.empty_slots()
                    self._reading = self._steps.empty_reading()
                except Exception:
                    log.exception("the model cannot run any more")
                    with self._wake:
                        self._broken = True
                    self._fail(BROKEN)
                    return

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when there will be nothing any more."""
        with self._wake:
            while not (self._waiting or self._reader or self.running):
                if self._closing:
                    return False
                self._wake.wait()
            return True

    def _drop(self) -> None:
        """Let go of jobs that nobody wants, or that are too late."""
        now = time.monotonic()

        def over(job: Job) -> bool:
            if job.cancelled:
                return True
            if not self._hurry and now < job.deadline:
                return False
            job.cancelled = True  # so that its other answers go without another word
            job.emit(STOPPED if self._hurry else TOO_LATE)
            return True

        with self._wake:
            waiting = list(self._waiting)
        gone = {id(job) for job in waiting if over(job)}
        if gone:
            with self._wake:
                self._waiting = deque(job for job in self._waiting if id(job) not in gone)
        if self._reader and over(self._reader.job):
            self._reader = None
        for slot, answer in enumerate(self._answers):
            if answer and over(answer.job):
                self._answers[slot] = None

    def _fail(self, event: Failed) -> None:
        """Tell everybody that there will be no answer."""
        with self._wake:
            jobs = list(self._waiting)
            self._waiting.clear()
        jobs += [self._reader.job] if self._reader else []
        jobs += [answer.job for answer in self._answers if answer]
        self._reader, self._answers = None, [None] * self.num_slots
        for job in jobs:
            if not job.cancelled:
                job.cancelled = True
                job.emit(event)

    def _read_on(self) -> None:
        """Read some pieces of prompts, and let those that were read join."""
        for _ in range(max(1, self.num_slots - self.running)):
            if self._reader is None:
                with self._wake:
                    if not self._waiting:
                        return
                    self._reader = Reader(self._waiting.popleft())
            reader = self._reader
            if reader.logits is None:
                self._read_piece(reader)
            if reader.logits is not None:
                self._join(reader, reader.logits)
            if reader.choice == reader.job.choices:
                self._reader = None
            elif reader.logits is not None:
                return  # every slot is taken

    def _read_piece(self, reader: Reader) -> None:
        """Embed one crop, or read one piece once there are no more."""
        job = reader.job
        if reader.crop < len(job.pixels):
            crop = job.pixels[reader.crop]
            self._reading = self._steps.see(self._reading, crop, reader.crop, job.seed)
            reader.crop += 1
            return
        tokens = job.tokens[reader.position : reader.position + self._steps.piece]
        self._reading, logits = self._steps.read(
            self._reading, tokens, reader.position, reader.visual
        )
        reader.position += len(tokens)
        reader.visual += int(np.count_nonzero(tokens == IMAGE_SLOT))
        if reader.position == len(job.tokens):
            reader.logits = logits

    def _join(self, reader: Reader, logits: Array) -> None:
        """Begin as many of a job's answers as there are idle slots."""
        job = reader.job
        for slot, taken in enumerate(self._answers):
            if taken is not None or reader.choice == job.choices:
                continue
            one = asked(job.sampling, job.seed, reader.choice)
            self._slots, picked = self._steps.join(self._slots, slot, self._reading, logits, one)
            job.first_token = job.first_token or time.monotonic()
            self._answers[slot] = Answer(job, reader.choice, self._tokenizer, self._eos_ids)
            reader.choice += 1
            self._push(slot, picked, 0)

    def _write(self) -> None:
        """Write one token of every answer."""
        active = np.array([answer is not None for answer in self._answers])
        if not active.any():
            return
        hows: list[How] = [_how(answer.job) for answer in self._answers if answer]
        how = max(hows, key=get_args(How).index)
        self._slots, picked = self._steps.write(self._slots, active, how)
        for slot in np.flatnonzero(active):
            self._push(int(slot), picked, int(slot))

    def _push(self, slot: int, picked: Picked, row: int) -> None:
        """Give the token of a row to the answer in a slot, which is free if that was the last."""
        answer = self._answers[slot]
        assert answer is not None
        token = TokenText(int(picked.tokens[row]), float(picked.log_probs[row]))
        top = ()
        if answer.job.top and picked.top is not None:
            ids, log_probs = (x[row][: answer.job.top].tolist() for x in picked.top)
            top = tuple(map(TokenText, ids, log_probs))
        if answer.push(Written(token, top)):
            self._answers[slot] = None
            answer.job.unfinished -= 1


def _how(job: Job) -> How:
    """The least that a step has to do for a job."""
    used: Sampling = job.sampling
    drawn = used.temperature is not None and bool(np.any(np.asarray(used.temperature) > 0))
    filtered = drawn and (used.top_k is not None or used.top_p is not None)
    if job.top or filtered or used.repetition_penalty is not None:
        return "all"
    return "drawn" if drawn else "greedy"
