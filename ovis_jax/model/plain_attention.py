"""Plain attention, the mask, which depends only on positions, and running kernels on a mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Shaped

from ovis_jax.model.layers import matmul_precision, softcap
from ovis_jax.model.quantized_kv import QuantizedKV
from ovis_jax.sharding import mesh_axis, mesh_of

MASKED_SCORE = jnp.finfo(jnp.float32).min
"""Score of a masked key. It is finite, so that a query whose keys are all masked gives no NaN."""


def visible(
    query_positions: Int[Array, "B T"], key_positions: Int[Array, "B S"], window: int | None
) -> Bool[Array, "B T S"]:
    """Return the mask of the keys that each query sees: those at its own and earlier positions.

    Args:
      query_positions: Absolute positions of the queries.
      key_positions: Absolute positions of the keys. The position -1 marks padding or an empty cache
        slot, which is never visible.
      window: Number of positions that are visible to a query, including its own; None for no limit.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]  # [B, T, S]
    seen = (distance >= 0) & (key_positions >= 0)[:, None, :]
    return seen if window is None else seen & (distance < window)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | QuantizedKV,
    v: Float[Array, "B K S H"] | QuantizedKV,
    mask: Bool[Array, "B T S"] | None,
    *,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Compute grouped-query attention: query head n attends to key head n // (N / K).

    Scores, soft capping and softmax are computed in float32. The attention weights are rounded to
    the dtype of `q`. The scores are multiplied by the scales of quantized keys, and the weights by
    the scales of quantized values, so that no dequantized keys and values are stored.

    Args:
      q: Queries.
      k: Keys.
      v: Values.
      mask: True where a key is visible to a query; None if every key is visible to every query.
      scale: Factor by which the scores are multiplied.
      cap: Soft cap of the scaled scores; None for no soft capping.
    """
    B, T, N, H = q.shape
    k, k_scale = _split_scale(k, q.dtype)
    v, v_scale = _split_scale(v, q.dtype)
    K = k.shape[1]
    # In both products, heads come before positions. XLA's CPU backend supports bfloat16 operands
    # with a float32 result only in this order. G and T form one axis Q, so that the gradients also
    # sum over one axis, without a transposed copy of the scores.
    grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    grouped = grouped.reshape(B, K, -1, H)  # [B, K, Q, H]
    precision = matmul_precision(q)
    scores = jnp.einsum(
        "BKQH,BKSH->BKQS", grouped, k, precision=precision, preferred_element_type=jnp.float32
    )
    if k_scale is not None:
        scores *= k_scale[:, :, None]
    scores = softcap(scores * scale, cap)
    if mask is not None:
        scores = scores.reshape(B, K, N // K, T, -1)
        scores = jnp.where(mask[:, None, None], scores, MASKED_SCORE)
        scores = scores.reshape(B, K, N // K * T, -1)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = (weights if v_scale is None else weights * v_scale[:, :, None]).astype(q.dtype)
    out = jnp.einsum(
        "BKQS,BKSH->BKQH", weights, v, precision=precision, preferred_element_type=jnp.float32
    )
    out = out.astype(q.dtype).reshape(B, K, N // K, T, H)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _split_scale(
    x: Float[Array, "B K S H"] | QuantizedKV, dtype: DTypeLike
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S"] | None]:
    """Return keys or values without their scale, and the scale; None if they are not quantized."""
    # The compilers for TPUs and GPUs convert the integers inside of the product, without a copy.
    return (x.q.astype(dtype), x.scale) if isinstance(x, QuantizedKV) else (x, None)


def run_kernel_per_device(
    kernel: Callable[..., Array], *arrays: Shaped[Array, "B ..."]
) -> Shaped[Array, "B heads length H"]:
    """Run a kernel on each device of a mesh, for the rows and heads on this device.

    The compiler cannot shard a custom kernel, so this function shards the arguments explicitly. The
    mesh is the mesh in scope or, if there is none, the mesh of the first array. If a mesh axis does
    not divide a dimension, the dimension is replicated.

    Args:
      kernel: Function that takes the local shards of the arrays and returns an array [B, heads,
        length, H].
      arrays: Arrays [B, heads, length, H] with N or K heads, such as queries or keys, and arrays
        [B, ...] with fewer axes, such as the segment of each position.
    """
    mesh = mesh_of(arrays[0])
    if not mesh.empty and not mesh.manual_axes:
        num_kv_heads = min(x.shape[1] for x in arrays if x.ndim == 4)
        batch = mesh_axis("B", arrays[0].shape[0], mesh)
        heads = PartitionSpec(batch, mesh_axis("K", num_kv_heads, mesh))
        specs = tuple(heads if x.ndim == 4 else PartitionSpec(batch) for x in arrays)
        kernel = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return kernel(*arrays)
