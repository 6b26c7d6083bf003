"""The choice of an attention kernel for each platform, and the calls that use it.

Every kernel here supports soft cap and sliding window, so the choice never changes the result.
`unsupported_reason` says what a kernel does not support. A decode step has a single query and
always uses plain attention. The modules of the kernels, `<kernel>_attention.py`, share one
interface: `attend_prompt` and, except for tokamax, `attend_crops`.
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
from ovis_jax.model.blockwise_attention import BLOCK_SIZE
from ovis_jax.model.plain_attention import attend, visible

AttentionKernel = Literal["auto", "plain", "blockwise", "splash", "tokamax"]
"""A kernel for prompts and crops, or "auto" for the platform's best. tokamax has no kernel for
crops, which then use plain attention."""

Platform = Literal["cpu", "gpu", "tpu"]


class KernelSetting(NamedTuple):
    """An attention kernel, and the platform to choose it for; None for the one JAX runs on."""

    kernel: AttentionKernel = "auto"
    platform: Platform | None = None


AttentionCall = Literal["prefill", "vision", "decode"]

PREFERRED_KERNELS: Mapping[tuple[str, AttentionCall], tuple[AttentionKernel, ...]] = {
    ("cpu", "prefill"): ("blockwise",),
    ("cpu", "vision"): ("blockwise",),
    ("gpu", "prefill"): ("tokamax", "blockwise"),
    # Blockwise handles crops one head at a time, which only pays off with the caches of a CPU.
    ("gpu", "vision"): ("plain",),
    ("tpu", "prefill"): ("splash", "blockwise"),
    ("tpu", "vision"): ("splash", "plain"),
}
"""Kernels by platform and call for more than `BLOCK_SIZE` queries; the first supported one runs."""


def unsupported_reason(kernel: str, platform: str, dtype: DTypeLike) -> str | None:
    """Say why a kernel cannot run; None if it can.

    Args:
      kernel: the kernel.
      platform: platform that the program runs on.
      dtype: dtype of queries, keys and values.
    """
    if kernel not in ("splash", "tokamax"):
        return None
    needed = "tpu" if kernel == "splash" else "gpu"
    if platform != needed:
        return f"cannot run on {platform}: it is a kernel for {needed.upper()}s"
    if kernel == "tokamax":
        if np.dtype(dtype).itemsize != 2:
            return f"does not support {np.dtype(dtype).name}"
        if find_spec("tokamax") is None:
            return "is not installed: pip install '.[cuda12]' or '.[cuda13]' in a clone of ovis_jax"
        if not _gpu_is_ampere_or_newer():
            return "needs an NVIDIA GPU of compute capability 8.0 or higher"
    return None


def _gpu_is_ampere_or_newer() -> bool:
    """Whether JAX runs on an NVIDIA GPU from Ampere on, or on no GPU at all."""
    if jax.default_backend() != "gpu":
        return True  # the program is compiled for another machine
    try:
        return float(jax.devices()[0].compute_capability) >= 8.0
    except (AttributeError, ValueError):  # AMD's capabilities are not numbers
        return False


def choose_kernel(
    kernel: str,
    call: AttentionCall,
    num_queries: int,
    dtype: DTypeLike = "bfloat16",
    platform: str | None = None,
) -> AttentionKernel:
    """Choose the kernel for a call.

    Args:
      kernel: an `AttentionKernel`: the kernel to force, or "auto".
      call: what attends.
      num_queries: queries per row: positions of a prompt, or patches of a crop.
      dtype: dtype of queries, keys and values.
      platform: the `Platform` that the program runs on; None for the one that JAX runs on.

    Returns:
      The forced kernel, or the platform's preferred one; plain for at most one block of queries.

    Raises:
      RequestError: the kernel or the platform is unknown, or the forced kernel cannot run there.
    """
    for name, value, known in (
        ("attention kernel", kernel, get_args(AttentionKernel)),
        ("platform", platform, (None, *get_args(Platform))),
    ):
        if value not in known:
            names = ", ".join(str(x) for x in known)
            raise RequestError(f"{name} is {value!r}, expected one of {names}")
    if call == "decode":
        return "plain"
    platform_name = platform or jax.default_backend()
    if kernel != "auto":
        reason = unsupported_reason(kernel, platform_name, dtype)
        if reason is not None:
            supported = [
                name
                for name in get_args(AttentionKernel)[1:]
                if unsupported_reason(name, platform_name, dtype) is None
            ]
            raise RequestError(
                f"attention kernel {kernel!r} {reason}; use {' or '.join(supported)}, or set the"
                " platform that the program is compiled for"
            )
        forced = cast(AttentionKernel, kernel)
        return "plain" if (forced, call) == ("tokamax", "vision") else forced
    if num_queries <= BLOCK_SIZE:
        return "plain"
    kernels = PREFERRED_KERNELS.get((platform_name, call), ("plain",))
    return next(x for x in kernels if unsupported_reason(x, platform_name, dtype) is None)


class KernelChoice(NamedTuple):
    """A line of `attention_report`.

    Attributes:
      call: what attends.
      num_queries: queries per row.
      num_heads: heads of the queries.
      head_dim: width of a head.
      kernel: the kernel that runs.
    """

    call: AttentionCall
    num_queries: int
    num_heads: int
    head_dim: int
    kernel: AttentionKernel


def attention_report(
    config: OvisConfig,
    prompt_length: int,
    kernel: str = "auto",
    *,
    dtype: DTypeLike = "bfloat16",
    platform: str | None = None,
) -> list[KernelChoice]:
    """List the kernels for crops, for prompts of a length, and for a decode step.

    Args:
      config: the model's config.
      prompt_length: positions of a prompt.
      kernel: see `choose_kernel`, as for `dtype` and `platform`.
      dtype: dtype of activations.
      platform: platform that the program runs on.

    Raises:
      RequestError: as `choose_kernel`.
    """
    vision, decoder = config.vision, config.decoder
    E, A, P = vision.width, vision.num_heads, vision.num_patches
    calls: list[tuple[AttentionCall, int, int, int]] = [
        ("vision", P, A, E // A),
        ("prefill", prompt_length, decoder.num_heads, decoder.head_dim),
        ("decode", 1, decoder.num_heads, decoder.head_dim),
    ]
    return [
        KernelChoice(*call, choose_kernel(kernel, *call[:2], dtype, platform)) for call in calls
    ]


def prompt_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    positions: Int[Array, "B T"],
    *,
    window: int | None,
    scale: float,
    cap: float | None,
    setting: KernelSetting,
) -> Float[Array, "B T N H"]:
    """Causal attention of full prompts, by the kernel that `choose_kernel` returns.

    See `blockwise_attention.attend_prompt` for the other arguments.

    Raises:
      RequestError: as `choose_kernel`.
    """
    kernel = choose_kernel(setting.kernel, "prefill", q.shape[1], q.dtype, setting.platform)
    if kernel == "plain":
        return attend(q, k, v, visible(positions, positions, window), scale=scale, cap=cap)
    module = _kernel_module(kernel)
    return module.attend_prompt(q, k, v, positions, window=window, scale=scale, cap=cap)


def crop_attention(
    q: Float[Array, "I P A H"],
    k: Float[Array, "I A P H"],
    v: Float[Array, "I A P H"],
    *,
    scale: float,
    setting: KernelSetting,
) -> Float[Array, "I P A H"]:
    """Attention of every patch to all patches of its crop, by the kernel of `choose_kernel`.

    Raises:
      RequestError: as `choose_kernel`.
    """
    kernel = choose_kernel(setting.kernel, "vision", q.shape[1], q.dtype, setting.platform)
    if kernel == "plain":
        return attend(q, k, v, None, scale=scale)
    return _kernel_module(kernel).attend_crops(q, k, v, scale=scale)


def _kernel_module(kernel: AttentionKernel) -> Any:
    """Import a kernel's module; Pallas and tokamax are slow to import."""
    return import_module(f"ovis_jax.model.{kernel}_attention")
