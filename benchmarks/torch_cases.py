"""What both sides do, stage by stage, in the benchmark beside PyTorch."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks import floors
from benchmarks.floors import Work
from benchmarks.measure import alternate, nbytes
from benchmarks.models import prompts
from benchmarks.torch_side import CacheKind, TorchSide
from ovis_jax import Inputs, LoadedOvis, generate, stream

ROOT = Path(__file__).parent.parent
STAGES = ("vision", "visual_tokens", "prefill", "decode", "request_warm", "request_cold")
TOLERANCE = 1e-4
"""How far float32 logits may lie apart, as a share of the largest."""
PROMPT = "What is in the picture?"
NO_CROPS = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Case:
    """One thing that both sides do. Times are for each of the `steps` that a call makes."""

    stage: str
    batch: int
    positions: int
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    work: Work
    steps: int = 1
    note: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """Both sides of one checkpoint in one dtype, and what is asked of them."""

    folder: Path
    temporary: Path
    dtype: str
    threads: int
    repeats: int
    ours: LoadedOvis
    theirs: TorchSide
    new_tokens: int

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return 4 if self.dtype == "float32" else 2

    def picture(self) -> Image.Image:
        """Noise, as large as one crop."""
        side = self.ours.config.vision.image_size
        return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))

    def request(self) -> Inputs:
        """A short prompt with one picture, preprocessed."""
        return self.ours.processor([PROMPT], [[self.picture()]])

    def check(self) -> float:
        """How far the logits behind the request lie apart; ends the program if that is too far."""
        inputs = self.request()
        ours, _ = jax.jit(lambda params: self.ours.model.prefill(params, inputs, 4096))(
            self.ours.params
        )
        theirs, _ = self.theirs.prefill(*unpadded(inputs), "dynamic", 4096)
        apart = float(np.abs(ours - theirs.numpy()).max() / np.abs(theirs.numpy()).max())
        if not apart <= TOLERANCE:
            raise SystemExit(
                f"the two sides disagree: logits {apart:.1e} apart, at most {TOLERANCE}"
            )
        mine = np.asarray(self.answer(inputs, 4))
        other = self.theirs.generate(*unpadded(inputs), "dynamic", 4)
        if mine.tolist() != other.tolist():
            raise SystemExit(f"the two sides disagree: tokens {mine[0]} and {other[0]}")
        return apart

    def answer(self, inputs: Inputs, new_tokens: int) -> jax.Array:
        """Our greedy answer, which stops at nothing."""
        model, params = self.ours.model, self.ours.params
        return generate(model, params, inputs, max_new_tokens=new_tokens, eos_ids=()).tokens

    def images(self, crops: int, whole: bool) -> Case:
        """SigLIP; with `whole` on to visual embeddings."""
        config, model, params = self.ours.config, self.ours.model, self.ours.params
        side = config.vision.image_size
        pixels = np.random.default_rng(0).normal(size=(crops, side, side, 3)).astype(np.float32)

        @jax.jit
        def see(params: Any, pixels: jax.Array) -> jax.Array:
            if whole:
                return model.embed_crops(params, pixels)
            return model.embed_images(params, pixels).vision[-1]

        on_device, theirs = jax.device_put(pixels), self.theirs.pixels(pixels)

        def their_see() -> Any:
            features = self.theirs.vision(theirs)
            return self.theirs.visual_tokens(features) if whole else features

        work = floors.vision(config, crops, self.itemsize)
        if whole:
            work += floors.visual_tokens(config, crops, self.itemsize)
        stage = "visual_tokens" if whole else "vision"
        return Case(stage, crops, 0, lambda: see(params, on_device), their_see, work)

    def prefill(self, length: int) -> Case:
        """Read one prompt of text."""
        config, model, params = self.ours.config, self.ours.model, self.ours.params
        inputs = prompts(config, 1, length, crops=0)
        room = length + self.new_tokens
        read = jax.jit(lambda params, inputs: model.prefill(params, inputs, room))
        on_device = jax.device_put(inputs)
        return Case(
            "prefill",
            1,
            length,
            lambda: read(params, on_device),
            lambda: self.theirs.prefill(inputs.tokens, NO_CROPS, "dynamic", room),
            floors.prefill(config, 1, length, self.itemsize),
        )

    def decode(self, rows: int, length: int) -> Case:
        """Write on and on behind prompts of `length` positions, `new_tokens` a call."""
        config, model, params = self.ours.config, self.ours.model, self.ours.params
        inputs = prompts(config, rows, length, crops=0)
        room = self.new_tokens * (self.repeats + 4)
        pieces = stream(
            model, params, inputs, max_new_tokens=room, eos_ids=(), chunk=self.new_tokens
        )

        def go_on() -> None:
            next(pieces)
            # `stream` computes one piece ahead: so that one is over too, and the next call has
            # exactly one to wait for.
            jax.block_until_ready([x for x in jax.live_arrays() if not x.is_deleted()])

        go_on()
        go_on()  # computes two pieces, the one ahead for the first time
        kind, tried = self.best_cache(inputs.tokens, room)
        their_go_on = self.theirs.answering(inputs.tokens, kind, room)
        middle = length + room // 2
        return Case(
            "decode",
            rows,
            length,
            go_on,
            lambda: their_go_on(self.new_tokens),
            floors.decode(config, rows, middle, self.itemsize),
            self.new_tokens,
            {"torch_cache": kind, "torch_cache_seconds": tried},
        )

    def best_cache(self, tokens: np.ndarray, room: int) -> tuple[CacheKind, dict[str, float]]:
        """The cache with which PyTorch's side writes fastest, and seconds a token with each."""
        kinds: tuple[CacheKind, ...] = ("dynamic", "static")
        calls = {kind: self.theirs.answering(tokens, kind, room) for kind in kinds}
        times = alternate({kind: lambda call=call: call(4) for kind, call in calls.items()}, 2)
        tried = {kind: times[kind].median / 4 for kind in kinds}
        return min(kinds, key=lambda kind: tried[kind]), tried

    def warm(self) -> Case:
        """A picture and a question -> `new_tokens` tokens, in a process that has done it before."""
        inputs = self.request()
        length = int((inputs.positions >= 0).sum())
        return Case(
            "request_warm",
            1,
            length,
            lambda: np.asarray(self.answer(self.request(), self.new_tokens)),
            lambda: self.theirs.generate(*unpadded(self.request()), "dynamic", self.new_tokens),
            floors.request(self.ours.config, length, 1, self.new_tokens, self.itemsize),
        )

    def cold(self) -> Case:
        """From the start of a process to the first token; our side's compilations are cached."""
        tokens, crops = unpadded(self.request())
        picture, saved = self.temporary / "picture.png", self.temporary / "inputs.npz"
        self.picture().save(picture)
        # PyTorch's side is spared the preprocessing, which is ours.
        np.savez(saved, tokens=tokens, crops=crops)
        arguments = [str(self.folder), self.dtype, str(self.threads)]
        weights = Work(0, nbytes(self.ours.params))
        return Case(
            "request_cold",
            1,
            tokens.shape[1],
            lambda: first_line(["benchmarks.cold_start", *arguments, PROMPT, str(picture)]),
            lambda: first_line(["benchmarks.torch_side", *arguments, str(saved)]),
            weights + floors.request(self.ours.config, tokens.shape[1], 1, 1, self.itemsize),
        )

    def cases(
        self, stages: list[str], crops: list[int], lengths: list[int], rows: list[int]
    ) -> Iterator[Case]:
        """Each case when the one before it is over."""
        if "vision" in stages:
            yield from (self.images(n, whole=False) for n in crops)
        if "visual_tokens" in stages:
            yield from (self.images(n, whole=True) for n in crops)
        if "prefill" in stages:
            yield from (self.prefill(n) for n in lengths)
        if "decode" in stages:
            yield from (self.decode(n, lengths[0]) for n in rows)
        if "request_warm" in stages:
            yield self.warm()
        if "request_cold" in stages:
            yield self.cold()


def unpadded(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """The one row without what pads it, and its crops."""
    return inputs.tokens[:, inputs.positions[0] >= 0], inputs.pixels


def first_line(arguments: list[str]) -> str:
    """Start a Python module, wait for the first line it prints, and end it."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    line = process.stdout.readline() if process.stdout else ""
    process.kill()
    process.wait()
    if not line:
        raise SystemExit(f"{arguments[0]} ended without an answer")
    return line
