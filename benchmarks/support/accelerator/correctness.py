"""Are the results right on this device?

Attention kernels are compared with plain attention in float32, checkpoints with the results of the
original code, and the engine with `generate`. Everything that is read ships with the repository.
"""

import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.support.accelerator.results import CaseRunner
from benchmarks.support.accelerator.settings import Settings
from ovis_jax import LoadedOvis, generate, load, presets
from ovis_jax.engine.request import Delta, Failure, Request
from ovis_jax.engine.scheduler import Scheduler, run_engine
from ovis_jax.inference.sampling import Sampling
from ovis_jax.model.attention_kernels import (
    AttentionKernel,
    KernelSetting,
    crop_attention,
    prompt_attention,
    unsupported_reason,
)
from ovis_jax.verify_goldens import GoldenFile, compare_with_golden

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden"
KERNEL_TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest difference from plain attention in float32, relative to the largest value."""
MAX_WAIT = 600.0
"""Seconds to wait for the engine."""
DEMO_QUESTIONS = {
    "shapes": (
        "Describe the picture.",
        "There is a big yellow circle at the top, a small orange diamond at the top right, a big "
        "purple cross on the right and a big black cross at the bottom left.",
    ),
    "word": ("Which word is in the picture?", "The word is WOLF."),
    "digit": ("Welche Ziffer zeigt das Bild?", "Die Ziffer ist 9."),
    "wide": ("Where is the green heart?", "The green heart is in the left half."),
}
"""The questions of `make demo`, and the answers that ovis-tiny gives on a CPU."""


def run(settings: Settings, cases: CaseRunner) -> None:
    """Run the part, the most important cases first."""
    names = list(DEMO_QUESTIONS)[: 1 if settings.rehearse else None]
    cases.run("demo answers, float32", partial(ask_demo_questions, "float32", names))
    cases.run("engine against generate", partial(compare_engine, names))
    for dtype in ("bfloat16", "float32"):
        for kernel in cast(tuple[AttentionKernel, ...], get_args(AttentionKernel)[1:]):
            if (kernel, dtype) == ("plain", "float32"):
                continue  # the others are compared with it
            reason = unsupported_reason(kernel, jax.default_backend(), dtype)
            case = f"kernel {kernel}, {dtype}"
            if reason is not None:
                cases.omit(case, f"{kernel} {reason}")
            else:
                cases.run(case, partial(compare_kernel, settings, kernel, dtype))
    for checkpoint, golden in golden_files(settings.rehearse):
        case = f"golden {checkpoint.name} {golden.path.stem}, {golden.dtype}"
        cases.run(case, partial(compare_with_golden_file, checkpoint, golden))
    cases.run("demo answers, bfloat16", partial(ask_demo_questions, "bfloat16", names))


def compare_kernel(settings: Settings, kernel: AttentionKernel, dtype: str) -> dict[str, Any]:
    """Compare a kernel with plain attention, for prompts and crops of the 9B's heads.

    Prompts have a soft cap, padding on both sides, and blocks with and without a sliding window.
    """
    config, sizes = presets.ovis1_6_gemma2_9b(), settings.sizes
    N, K, H = config.decoder.num_heads, config.decoder.num_kv_heads, config.decoder.head_dim
    A, P = config.vision.num_heads, config.vision.num_patches
    if settings.rehearse:
        N, K, A = 4, 2, 2
    rng = np.random.default_rng(0)
    differences = {}
    for length in sizes.attention_lengths:
        q = rng.standard_normal((2, length, N, H), np.float32) * 3
        k, v = rng.standard_normal((2, 2, K, length, H), np.float32)
        positions = np.stack([np.arange(length) - 40, np.arange(length)]).astype(np.int32)
        positions[1, -60:] = -1
        positions = np.maximum(positions, -1)
        for window in (
            (None, sizes.attention_window) if length > sizes.attention_window else (None,)
        ):
            attend = partial(
                prompt_attention,
                positions=jnp.asarray(positions),
                window=window,
                scale=H**-0.5,
                cap=config.decoder.attn_softcap,
            )
            name = f"prompt of {length}, window {window}"
            real = (positions >= 0)[:, :, None, None]
            differences[name] = _kernel_difference(attend, kernel, dtype, (q, k, v), real)
    H = config.vision.width // config.vision.num_heads
    q = rng.standard_normal((2, P, A, H), np.float32) * 3
    k, v = rng.standard_normal((2, 2, A, P, H), np.float32)
    attend = partial(crop_attention, scale=H**-0.5)
    differences["crops"] = _kernel_difference(attend, kernel, dtype, (q, k, v), np.array(True))
    largest = float(np.max(list(differences.values())))  # NaN if one of them is
    return {
        "passed": largest <= KERNEL_TOLERANCES[dtype],
        "difference": largest,
        "tolerance": KERNEL_TOLERANCES[dtype],
        "differences": differences,
    }


def _kernel_difference(
    attend: Callable[..., Array],
    kernel: AttentionKernel,
    dtype: str,
    arrays: tuple[np.ndarray, ...],
    real: np.ndarray,
) -> float:
    """Return the largest difference from plain attention, relative to the largest value.

    Args:
      attend: Attention as a function of q, k, v and `setting`.
      kernel: The kernel.
      dtype: Dtype of the kernel's arrays; plain attention runs in float32 on the same values.
      arrays: q, k and v.
      real: Mask of the results that are not padding.
    """
    rounded = [jnp.asarray(x, dtype) for x in arrays]
    exact = [x.astype(jnp.float32) for x in rounded]
    found = jax.jit(partial(attend, setting=KernelSetting(kernel)))(*rounded)
    expected = jax.jit(partial(attend, setting=KernelSetting("plain")))(*exact)
    found, expected = (jnp.where(real, x.astype(jnp.float32), 0) for x in (found, expected))
    return float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))


def golden_files(rehearse: bool) -> Iterator[tuple[Path, GoldenFile]]:
    """Yield golden files with their checkpoints: one of each checkpoint and dtype first."""
    first, rest = [], []
    for folder in sorted((GOLDEN / "cases").iterdir()):
        seen: set[str] = set()
        for path in sorted(folder.glob("*.npz")):
            golden = GoldenFile(path)
            (rest if golden.dtype in seen else first).append((GOLDEN / folder.name, golden))
            seen.add(golden.dtype)
    yield from first
    if not rehearse:
        yield from rest


@cache
def load_once(checkpoint: Path | str, dtype: str) -> LoadedOvis:
    """Load a checkpoint, once per dtype."""
    return load(checkpoint, dtype=dtype)


def compare_with_golden_file(checkpoint: Path, golden: GoldenFile) -> dict[str, Any]:
    """Compare a checkpoint with results of the original code, stage by stage."""
    stages = compare_with_golden(load_once(checkpoint, golden.dtype), golden)
    shares = [stage.difference / stage.tolerance for stage in stages if stage.tolerance]
    return {
        "passed": all(stage.passed for stage in stages),
        "stages": len(stages),
        "largest_part_of_tolerance": float(np.max(shares)),
        "failed_stages": [
            f"{stage.name}: {stage.difference:.2g} > {stage.tolerance:g}"
            for stage in stages
            if not stage.passed
        ],
    }


def ask_demo_questions(dtype: str, names: list[str]) -> dict[str, Any]:
    """Ask ovis-tiny questions of `make demo`; in bfloat16, rounding may change an answer."""
    ovis = load_once("ovis-tiny", dtype)
    wrong = {}
    for name in names:
        question, expected = DEMO_QUESTIONS[name]
        answer = ovis.ask(question, ROOT / "examples" / f"{name}.png")
        if answer != expected:
            wrong[name] = answer
    passed = not wrong or dtype == "bfloat16"
    return {"passed": passed, "questions": len(names), "wrong_answers": wrong}


def compare_engine(names: list[str]) -> dict[str, Any]:
    """Compare the engine's greedy answers with those of `generate`, each question asked twice."""
    ovis = load_once("ovis-tiny", "float32")
    new_tokens, prompts, expected = 24, [], []
    for name in names:
        question, images = DEMO_QUESTIONS[name][0], [ROOT / "examples" / f"{name}.png"]
        inputs = ovis.processor(question, images)
        out = generate(ovis.model, ovis.params, inputs, max_new_tokens=new_tokens)
        ids = np.asarray(out.tokens)[0, : int(out.lengths[0])]
        expected += 2 * [ovis.processor.decode(ids)]
        example = ovis.processor.encode(question, images)
        prompts += 2 * [(example.tokens, example.pixels)]
    with run_engine(ovis, max_num_seqs=3, max_model_len=256, chunk_size=32) as scheduler:
        texts = submit_and_wait(scheduler, prompts, new_tokens)
    different = [n for n, (a, b) in enumerate(zip(texts, expected, strict=True)) if a != b]
    return {"passed": not different, "requests": len(texts), "different": different}


def submit_and_wait(
    scheduler: Scheduler,
    prompts: list[tuple[np.ndarray, np.ndarray]],
    new_tokens: int,
    *,
    ignore_eos: bool = False,
) -> list[str]:
    """Submit greedy requests to an engine, and return their texts when all are complete.

    With `ignore_eos`, each answer has exactly `new_tokens` tokens.

    Raises:
      RuntimeError: The engine gave up on a request.
      TimeoutError: A request had no answer after MAX_WAIT seconds.
    """
    texts: list[str] = [""] * len(prompts)
    failures: list[str] = []
    open_requests, complete = [len(prompts)], threading.Event()

    def on_event(index: int, event: Delta | Failure) -> None:
        if isinstance(event, Failure):
            failures.append(event.message)
        else:
            texts[index] += event.text
        if isinstance(event, Failure) or event.finish_reason is not None:
            open_requests[0] -= 1
            if not open_requests[0]:
                complete.set()

    for index, (tokens, pixels) in enumerate(prompts):
        scheduler.submit(
            Request(
                tokens,
                pixels,
                Sampling(),
                seed=0,
                max_new_tokens=new_tokens,
                deadline=time.monotonic() + MAX_WAIT,
                on_event=lambda event, index=index: on_event(index, event),
                ignore_eos=ignore_eos,
                stream=False,
            )
        )
    if not complete.wait(MAX_WAIT):
        raise TimeoutError(f"{open_requests[0]} requests had no answer after {MAX_WAIT} seconds")
    if failures:
        raise RuntimeError(f"{len(failures)} requests failed: {failures[0]}")
    return texts
