"""Which attention kernel runs where.

Every kernel offered here does soft cap and window, so that no choice can lose one of them; what
else a kernel cannot do, `why_not` says. A decode step has a single query and is always plain.
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ovis_jax.config import OvisConfig
from ovis_jax.errors import RequestError
from ovis_jax.model.attention import attend, visible
from ovis_jax.model.blockwise import BLOCK

Kernel = Literal["plain", "blockwise", "splash", "tokamax"]
Call = Literal["prefill", "vision", "decode"]
Setting = Literal["auto", "cpu", "gpu", "tpu", "plain", "blockwise", "splash", "tokamax"]
"""The name of a kernel forces it, for prompts and crops (tokamax: for prompts, crops are plain);
that of a platform stands for its choice, in a program that is compiled elsewhere; "auto" is the
platform that JAX runs on."""

PREFERRED: Mapping[tuple[str, Call], tuple[Kernel, ...]] = {
    ("cpu", "prefill"): ("blockwise",),
    ("cpu", "vision"): ("blockwise",),
    ("gpu", "prefill"): ("tokamax", "blockwise"),
    # One head after the other, as blockwise takes crops, is for the caches of a CPU.
    ("gpu", "vision"): ("plain",),
    ("tpu", "prefill"): ("splash", "blockwise"),
    ("tpu", "vision"): ("splash", "plain"),
}
"""What serves a call of more than one block: the first kernel that can."""


def why_not(kernel: Kernel, platform: str, dtype: DTypeLike) -> str | None:
    """Why a kernel cannot serve prompts or crops; None where it can.

    Args:
      kernel: the kernel.
      platform: what the program runs on.
      dtype: of queries, keys and values.
    """
    if kernel not in ("splash", "tokamax"):
        return None
    needed = "tpu" if kernel == "splash" else "gpu"
    if platform != needed:
        return f"cannot run on {platform}: it is a kernel for {needed.upper()}s"
    if kernel == "tokamax":
        if np.dtype(dtype).itemsize != 2:
            return f"has no {np.dtype(dtype).name} products"
        if find_spec("tokamax") is None:
            return "is not installed: pip install 'ovis-jax[cuda12]'"
        if not _new_enough():
            return "needs an NVIDIA GPU of compute capability 8.0 or more"
    return None


def _new_enough() -> bool:
    """Whether the GPU that JAX runs on, if it does, is an NVIDIA one from Ampere on."""
    if jax.default_backend() != "gpu":
        return True  # the program is compiled for another machine
    try:
        return float(jax.devices()[0].compute_capability) >= 8.0
    except (AttributeError, ValueError):  # AMD's are no numbers
        return False


def choose_kernel(
    setting: str,
    call: Call,
    T: int,
    *,
    dtype: DTypeLike = "bfloat16",
    backend: str | None = None,
) -> Kernel:
    """The kernel that serves a call.

    Args:
      setting: of the model.
      call: what attends.
      T: queries of a row: positions of a prompt, or patches of a crop.
      dtype: of queries, keys and values.
      backend: the platform of "auto"; None for the one that JAX runs on.

    Returns:
      The kernel that was forced, or the platform's; plain for what fits in one block.

    Raises:
      RequestError: the setting is unknown, or forces a kernel that cannot run here.
    """
    if setting not in get_args(Setting):
        known = ", ".join(get_args(Setting))
        raise RequestError(f"attention is {setting!r}, expected one of {known}")
    if call == "decode":
        return "plain"
    backend = backend or jax.default_backend()
    if setting in get_args(Kernel):
        forced = cast(Kernel, setting)
        reason = why_not(forced, backend, dtype)
        if reason is not None:
            every: tuple[Kernel, ...] = get_args(Kernel)
            can = [x for x in every if why_not(x, backend, dtype) is None]
            raise RequestError(
                f"attention is {setting!r}, which {reason}; use {' or '.join(can)}, or the name of"
                " a platform for a program that is compiled for it elsewhere"
            )
        return "plain" if (forced, call) == ("tokamax", "vision") else forced
    if T <= BLOCK:
        return "plain"
    platform = backend if setting == "auto" else setting
    kernels = PREFERRED.get((platform, call), ("plain",))
    return next(x for x in kernels if why_not(x, platform, dtype) is None)


class Choice(NamedTuple):
    """A line of `attention_report`."""

    call: Call
    T: int
    """Queries of a row."""
    heads: int
    head_dim: int
    kernel: Kernel


def attention_report(
    config: OvisConfig,
    T: int,
    setting: str = "auto",
    *,
    dtype: DTypeLike = "bfloat16",
    backend: str | None = None,
) -> list[Choice]:
    """Which kernels a model runs for crops, for prompts of T positions, and for a decode step.

    Raises:
      RequestError: as `choose_kernel`.
    """
    vision, decoder = config.vision, config.decoder
    E, A, P = vision.width, vision.num_heads, vision.num_patches
    calls: list[tuple[Call, int, int, int]] = [
        ("vision", P, A, E // A),
        ("prefill", T, decoder.num_heads, decoder.head_dim),
        ("decode", 1, decoder.num_heads, decoder.head_dim),
    ]
    how = {"dtype": dtype, "backend": backend}
    return [
        Choice(call, T, heads, H, choose_kernel(setting, call, T, **how))
        for call, T, heads, H in calls
    ]


def attend_prompt(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    positions: Int[Array, "B T"],
    *,
    window: int | None,
    scale: float,
    cap: float | None,
    setting: Setting,
) -> Float[Array, "B T N H"]:
    """Attention of whole prompts over themselves, by the kernel chosen for them.

    See `blockwise.attend_prompt` for the arguments.

    Raises:
      RequestError: as `choose_kernel`.
    """
    kernel = choose_kernel(setting, "prefill", q.shape[1], dtype=q.dtype)
    if kernel == "plain":
        return attend(q, k, v, visible(positions, positions, window), scale=scale, cap=cap)
    return _module(kernel).attend_prompt(q, k, v, positions, window=window, scale=scale, cap=cap)


def attend_crops(
    q: Float[Array, "I P A H"],
    k: Float[Array, "I A P H"],
    v: Float[Array, "I A P H"],
    *,
    scale: float,
    setting: Setting,
) -> Float[Array, "I P A H"]:
    """Attention of every patch of a crop over all of them, by the kernel chosen for it.

    Raises:
      RequestError: as `choose_kernel`.
    """
    kernel = choose_kernel(setting, "vision", q.shape[1], dtype=q.dtype)
    if kernel == "plain":
        return attend(q, k, v, None, scale=scale)
    return _module(kernel).attend_crops(q, k, v, scale=scale)


def _module(kernel: Kernel) -> Any:
    """The module of a kernel; Pallas and tokamax, slow to import, only where they are chosen."""
    return import_module(f"ovis_jax.model.{kernel}")
