"""The stages that both sides run in the comparison with PyTorch."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks.support.random_inputs import random_inputs, tree_bytes
from benchmarks.support.stage_costs import (
    StageCost,
    decode_cost,
    prefill_cost,
    request_cost,
    vision_cost,
    visual_head_cost,
)
from benchmarks.support.timing import time_in_turns
from benchmarks.support.transformers_ovis import CacheKind, TransformersOvis
from ovis_jax import Inputs, LoadedOvis, generate, stream

ROOT = Path(__file__).parents[2]
STAGES = ("vision", "visual_tokens", "prefill", "decode", "request_warm", "request_cold")
TOLERANCE = 1e-4
"""Maximum difference of float32 logits, relative to the largest logit."""
PROMPT = "What is in the picture?"
NO_CROPS = np.zeros(0, np.float32)


@dataclass(frozen=True)
class StageComparison:
    """One stage as both sides run it.

    Attributes:
      stage: One of STAGES.
      batch_size: Number of rows, or of crops for the vision stages.
      positions: Positions per row; 0 for the vision stages.
      run_jax: Runs the stage with ovis_jax.
      run_torch: Runs the stage with PyTorch.
      cost: FLOPs and bytes of one step.
      steps: Number of steps per call; times are reported per step.
      extra_fields: Further fields of the result.
    """

    stage: str
    batch_size: int
    positions: int
    run_jax: Callable[[], Any]
    run_torch: Callable[[], Any]
    cost: StageCost
    steps: int = 1
    extra_fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TorchComparison:
    """Both sides of one checkpoint in one dtype.

    Attributes:
      folder: Checkpoint folder.
      temporary_folder: Folder for files that processes exchange.
      dtype: "float32" or "bfloat16".
      threads: Number of threads per side.
      repeats: Number of timed rounds.
      jax_side: The checkpoint, loaded by ovis_jax.
      torch_side: The checkpoint, loaded by transformers.
      new_tokens: Number of tokens per request and per timing of decode.
    """

    folder: Path
    temporary_folder: Path
    dtype: str
    threads: int
    repeats: int
    jax_side: LoadedOvis
    torch_side: TransformersOvis
    new_tokens: int

    @property
    def itemsize(self) -> int:
        """Bytes per weight."""
        return 4 if self.dtype == "float32" else 2

    def noise_crop(self) -> Image.Image:
        """Create an image of random pixels of the size of one crop."""
        side = self.jax_side.config.vision.image_size
        return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))

    def preprocess_request(self) -> Inputs:
        """Preprocess a short prompt with one image."""
        return self.jax_side.processor([PROMPT], [[self.noise_crop()]])

    def check_agreement(self) -> float:
        """Return the relative difference of the logits after a request.

        Raises:
          SystemExit: the logits differ by more than TOLERANCE, or the greedy answers differ.
        """
        inputs = self.preprocess_request()
        ours, _ = jax.jit(lambda params: self.jax_side.model.prefill(params, inputs, 4096))(
            self.jax_side.params
        )
        theirs, _ = self.torch_side.prefill(*unpadded_row(inputs), "dynamic", 4096)
        difference = float(np.abs(ours - theirs.numpy()).max() / np.abs(theirs.numpy()).max())
        if not difference <= TOLERANCE:
            raise SystemExit(
                f"the two sides disagree: logits differ by {difference:.1e} of the largest,"
                f" expected at most {TOLERANCE}"
            )
        our_tokens = np.asarray(self.answer(inputs, 4))
        their_tokens = self.torch_side.generate(*unpadded_row(inputs), "dynamic", 4)
        if our_tokens.tolist() != their_tokens.tolist():
            raise SystemExit(
                f"the two sides disagree: ovis_jax generates the tokens {our_tokens[0]}, PyTorch"
                f" {their_tokens[0]}"
            )
        return difference

    def answer(self, inputs: Inputs, new_tokens: int) -> jax.Array:
        """Generate a greedy answer of exactly `new_tokens` tokens with ovis_jax."""
        model, params = self.jax_side.model, self.jax_side.params
        return generate(model, params, inputs, max_new_tokens=new_tokens, eos_ids=()).tokens

    def vision_stage(self, crops: int, *, through_visual_tokens: bool) -> StageComparison:
        """Compare the vision encoder, or everything from pixels to visual embeddings."""
        config, model, params = self.jax_side.config, self.jax_side.model, self.jax_side.params
        side = config.vision.image_size
        pixels = np.random.default_rng(0).normal(size=(crops, side, side, 3)).astype(np.float32)

        @jax.jit
        def run(params: Any, pixels: jax.Array) -> jax.Array:
            if through_visual_tokens:
                return model.embed_images(params, pixels)
            return model.encode_vision(params, pixels)[-1]

        on_device, torch_pixels = jax.device_put(pixels), self.torch_side.to_pixels(pixels)

        def run_torch() -> Any:
            features = self.torch_side.encode_vision(torch_pixels)
            return self.torch_side.embed_features(features) if through_visual_tokens else features

        cost = vision_cost(config, crops, self.itemsize)
        if through_visual_tokens:
            cost += visual_head_cost(config, crops, self.itemsize)
        stage = "visual_tokens" if through_visual_tokens else "vision"
        return StageComparison(stage, crops, 0, lambda: run(params, on_device), run_torch, cost)

    def prefill_stage(self, length: int) -> StageComparison:
        """Compare the prefill of one text prompt."""
        config, model, params = self.jax_side.config, self.jax_side.model, self.jax_side.params
        inputs = random_inputs(config, 1, length, crops_per_row=0)
        max_length = length + self.new_tokens
        prefill = jax.jit(lambda params, inputs: model.prefill(params, inputs, max_length))
        on_device = jax.device_put(inputs)
        return StageComparison(
            "prefill",
            1,
            length,
            lambda: prefill(params, on_device),
            lambda: self.torch_side.prefill(inputs.tokens, NO_CROPS, "dynamic", max_length),
            prefill_cost(config, 1, length, self.itemsize),
        )

    def decode_stage(self, batch_size: int, length: int) -> StageComparison:
        """Compare decoding after prompts of `length` positions, `new_tokens` tokens per call."""
        config, model, params = self.jax_side.config, self.jax_side.model, self.jax_side.params
        inputs = random_inputs(config, batch_size, length, crops_per_row=0)
        max_new_tokens = self.new_tokens * (self.repeats + 4)
        chunks = stream(
            model,
            params,
            inputs,
            max_new_tokens=max_new_tokens,
            eos_ids=(),
            chunk_size=self.new_tokens,
        )

        def next_chunk() -> None:
            next(chunks)
            # `stream` computes one chunk ahead. Wait for that chunk, too, so that each call
            # computes exactly one chunk.
            jax.block_until_ready([x for x in jax.live_arrays() if not x.is_deleted()])

        next_chunk()
        next_chunk()  # compiles the program of all later chunks
        kind, candidates = self.fastest_torch_cache(inputs.tokens, max_new_tokens)
        torch_decode = self.torch_side.start_decoding(inputs.tokens, kind, max_new_tokens)
        mean_length = length + max_new_tokens // 2
        return StageComparison(
            "decode",
            batch_size,
            length,
            next_chunk,
            lambda: torch_decode(self.new_tokens),
            decode_cost(config, batch_size, mean_length, self.itemsize),
            self.new_tokens,
            {"torch_cache": kind, "torch_cache_seconds": candidates},
        )

    def fastest_torch_cache(
        self, tokens: np.ndarray, max_new_tokens: int
    ) -> tuple[CacheKind, dict[str, float]]:
        """Return the cache with which PyTorch decodes fastest, and seconds per token of each."""
        kinds: tuple[CacheKind, ...] = ("dynamic", "static")
        decoders = {
            kind: self.torch_side.start_decoding(tokens, kind, max_new_tokens) for kind in kinds
        }
        timings = time_in_turns({kind: partial(decoders[kind], 4) for kind in kinds}, repeats=2)
        seconds = {kind: timings[kind].median / 4 for kind in kinds}
        return min(kinds, key=lambda kind: seconds[kind]), seconds

    def warm_request(self) -> StageComparison:
        """Compare a complete request, from an image and a question to `new_tokens` tokens."""
        inputs = self.preprocess_request()
        length = int((inputs.positions >= 0).sum())
        return StageComparison(
            "request_warm",
            1,
            length,
            lambda: np.asarray(self.answer(self.preprocess_request(), self.new_tokens)),
            lambda: self.torch_side.generate(
                *unpadded_row(self.preprocess_request()), "dynamic", self.new_tokens
            ),
            request_cost(self.jax_side.config, length, 1, self.new_tokens, self.itemsize),
        )

    def cold_request(self) -> StageComparison:
        """Compare the time from process start to the first token, with a warm compile cache."""
        tokens, crops = unpadded_row(self.preprocess_request())
        image_path, inputs_path = (
            self.temporary_folder / "picture.png",
            self.temporary_folder / "inputs.npz",
        )
        self.noise_crop().save(image_path)
        # PyTorch's process reads preprocessed inputs: preprocessing is part of ovis_jax.
        np.savez(inputs_path, tokens=tokens, crops=crops)
        arguments = [str(self.folder), self.dtype, str(self.threads)]
        ours = ["benchmarks.support.first_token_process", *arguments, PROMPT, str(image_path)]
        theirs = ["benchmarks.support.transformers_ovis", *arguments, str(inputs_path)]
        read_weights = StageCost(0, tree_bytes(self.jax_side.params))
        return StageComparison(
            "request_cold",
            1,
            tokens.shape[1],
            lambda: run_module_until_first_line(ours),
            lambda: run_module_until_first_line(theirs),
            read_weights + request_cost(self.jax_side.config, tokens.shape[1], 1, 1, self.itemsize),
        )

    def prepare_stages(
        self, stages: list[str], crops: list[int], lengths: list[int], batch_sizes: list[int]
    ) -> Iterator[StageComparison]:
        """Yield the comparisons; each is prepared when the previous one is done.

        Args:
          stages: names out of STAGES.
          crops: numbers of crops of the vision stages.
          lengths: prompt lengths of prefill; decode uses the first.
          batch_sizes: batch sizes of decode.
        """
        if "vision" in stages:
            yield from (self.vision_stage(n, through_visual_tokens=False) for n in crops)
        if "visual_tokens" in stages:
            yield from (self.vision_stage(n, through_visual_tokens=True) for n in crops)
        if "prefill" in stages:
            yield from (self.prefill_stage(n) for n in lengths)
        if "decode" in stages:
            yield from (self.decode_stage(n, lengths[0]) for n in batch_sizes)
        if "request_warm" in stages:
            yield self.warm_request()
        if "request_cold" in stages:
            yield self.cold_request()


def unpadded_row(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a single row without padding, and its crops."""
    return inputs.tokens[:, inputs.positions[0] >= 0], inputs.pixels


def run_module_until_first_line(arguments: list[str]) -> str:
    """Run `python -m` with arguments, wait for the first line of output, and kill the process."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    line = process.stdout.readline() if process.stdout else ""
    process.kill()
    process.wait()
    if not line:
        raise SystemExit(f"python -m {arguments[0]} exited without output")
    return line
