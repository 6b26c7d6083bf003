"""Choosing the attention kernel for each platform, and calling it.

Every kernel supports soft capping and sliding windows, so all kernels give the same result up to
rounding. `unsupported_reason` checks the limits of a kernel. A decode step has a single query per
row and always uses plain attention. The kernel modules, `<kernel>_attention.py`, share one
interface: `attend_prompt` and, except for tokamax, `attend_crops`.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ovis_jax.config import OvisConfig
from ovis_jax.errors import RequestError, install_command
from ovis_jax.model.blockwise_attention import BLOCK_SIZE
from ovis_jax.model.plain_attention import attend, visible
from ovis_jax.model.reverse_mode_only import reverse_mode_only

AttentionKernel = Literal["auto", "plain", "blockwise", "splash", "tokamax"]
"""The name of a kernel for prompts and crops, or "auto" for the best kernel on the platform. With
tokamax, which has no kernel for crops, crops use plain attention."""

Platform = Literal["cpu", "gpu", "tpu"]


class KernelSetting(NamedTuple):
    """A kernel, and the platform for which "auto" is resolved; None for JAX's current platform."""

    kernel: AttentionKernel = "auto"
    platform: Platform | None = None


AttentionCall = Literal["prefill", "vision", "decode"]

PREFERRED_KERNELS: Mapping[tuple[str, AttentionCall], tuple[AttentionKernel, ...]] = {
    ("cpu", "prefill"): ("blockwise",),
    ("cpu", "vision"): ("blockwise",),
    ("gpu", "prefill"): ("tokamax", "blockwise"),
    # Blockwise attention processes crops one head at a time, which is only faster with a CPU's
    # caches.
    ("gpu", "vision"): ("plain",),
    ("tpu", "prefill"): ("splash", "blockwise"),
    ("tpu", "vision"): ("splash", "plain"),
}
"""Kernels for more than `BLOCK_SIZE` queries, by platform and call. The first supported kernel is
used."""


def unsupported_reason(kernel: str, platform: str, dtype: DTypeLike) -> str | None:
    """Return the reason why a kernel cannot run, or None if it can.

    Args:
      kernel: The kernel.
      platform: Platform that the program runs on.
      dtype: Dtype of queries, keys and values.
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
            return f"is not installed: {install_command('cuda12', 'cuda13')}"
        if not _gpu_is_ampere_or_newer():
            return "needs an NVIDIA GPU of compute capability 8.0 or higher"
    return None


def _gpu_is_ampere_or_newer() -> bool:
    """Return whether JAX runs on an NVIDIA GPU of the Ampere generation or newer, or on no GPU."""
    if jax.default_backend() != "gpu":
        return True  # JAX runs on no GPU, so the program is for another machine
    try:
        return float(jax.devices()[0].compute_capability) >= 8.0
    except (AttributeError, ValueError):  # AMD GPUs have capabilities that are not numbers
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
      kernel: The `AttentionKernel` to force, or "auto" to choose one.
      call: The use of the kernel: "prefill", "vision" or "decode".
      num_queries: Number of queries per row: positions in a prompt, or patches in a crop.
      dtype: Dtype of queries, keys and values.
      platform: The `Platform` that the program runs on; None for JAX's current platform.

    Returns:
      The forced kernel, or the preferred kernel on the platform. With "auto", plain attention is
      used if there is at most one block of queries.

    Raises:
      RequestError: The kernel or the platform is unknown, or the forced kernel cannot run on the
        platform.
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
    """One entry in the result of `attention_report`.

    Attributes:
      call: The use of the kernel: "prefill", "vision" or "decode".
      num_queries: Number of queries per row.
      num_heads: Number of query heads.
      head_dim: Number of channels per head.
      kernel: The kernel that is used.
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
    """List the kernels that are used for crops, for prompts of one length, and for decoding.

    Args:
      config: The model's config.
      prompt_length: Number of positions in a prompt.
      kernel: The `AttentionKernel` to force, or "auto", as in `choose_kernel`.
      dtype: Dtype of the activations.
      platform: Platform that the program runs on; None for JAX's current platform.

    Raises:
      RequestError: The kernel or the platform is unknown, or the forced kernel cannot run on the
        platform.
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
    """Compute causal attention for full prompts, with the kernel that `choose_kernel` returns.

    `blockwise_attention.attend_prompt` documents the arguments except for `setting`.

    Raises:
      RequestError: The kernel or the platform is unknown, or the forced kernel cannot run on the
        platform.
    """
    kernel = choose_kernel(setting.kernel, "prefill", q.shape[1], q.dtype, setting.platform)
    if kernel == "plain":
        return attend(q, k, v, visible(positions, positions, window), scale=scale, cap=cap)
    q, k, v = _exclude_forward_mode(kernel, q, k, v)
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
    """Compute attention of every patch to all patches in its crop, with the chosen kernel.

    Raises:
      RequestError: The kernel or the platform is unknown, or the forced kernel cannot run on the
        platform.
    """
    kernel = choose_kernel(setting.kernel, "vision", q.shape[1], q.dtype, setting.platform)
    if kernel == "plain":
        return attend(q, k, v, None, scale=scale)
    q, k, v = _exclude_forward_mode(kernel, q, k, v)
    return _kernel_module(kernel).attend_crops(q, k, v, scale=scale)


def _exclude_forward_mode(kernel: AttentionKernel, *arrays: Array) -> Iterator[Array]:
    """Return the arrays; with splash or tokamax, forward-mode differentiation raises an error."""
    excluded = kernel in ("splash", "tokamax")
    name = f"the attention kernel {kernel!r}"
    return (reverse_mode_only(x, name) if excluded else x for x in arrays)


def _kernel_module(kernel: AttentionKernel) -> Any:
    """Import a kernel's module only when needed, because Pallas and tokamax are slow to import."""
    return import_module(f"ovis_jax.model.{kernel}_attention")
