"""Attention from absolute positions: the mask, the plain computation, and kernels on a mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from ovis_jax.model.layers import matmul_precision, softcap
from ovis_jax.sharding import mesh_axis

MASKED_SCORE = jnp.finfo(jnp.float32).min
"""Score of a masked key. It is finite, so that a row whose keys are all masked has no NaN."""


def visible(
    query_positions: Int[Array, "B T"], key_positions: Int[Array, "B S"], window: int | None
) -> Bool[Array, "B T S"]:
    """Mask of the keys that each query sees: its own position and those before it.

    Args:
      query_positions: absolute positions.
      key_positions: absolute positions; -1 marks padding or an empty cache slot, never seen.
      window: number of positions that a query sees, including its own; None for no limit.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]  # [B, T, S]
    seen = (distance >= 0) & (key_positions >= 0)[:, None, :]
    return seen if window is None else seen & (distance < window)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"] | None,
    *,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped heads: query head n reads key head n // (N / K).

    Scores, soft cap and softmax are float32. The weights are rounded to the dtype of `q`.

    Args:
      q: queries.
      k: keys.
      v: values.
      mask: True where a query sees a key; None if every query sees every key.
      scale: factor on the scores.
      cap: soft cap on the scaled scores; None for no cap.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    # Heads come before positions in both products, the only order that XLA's CPU backend supports
    # for bfloat16 operands and a float32 result. G and T form one axis Q, so that the gradients sum
    # over one axis too and need no transposed copy of the scores.
    grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    grouped = grouped.reshape(B, K, -1, H)  # [B, K, Q, H]
    precision = matmul_precision(q)
    scores = jnp.einsum(
        "BKQH,BKSH->BKQS", grouped, k, precision=precision, preferred_element_type=jnp.float32
    )
    scores = scores * scale if cap is None else softcap(scores * scale, cap)
    if mask is not None:
        scores = scores.reshape(B, K, N // K, T, -1)
        scores = jnp.where(mask[:, None, None], scores, MASKED_SCORE)
        scores = scores.reshape(B, K, N // K * T, -1)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum(
        "BKQS,BKSH->BKQH", weights, v, precision=precision, preferred_element_type=jnp.float32
    )
    out = out.astype(q.dtype).reshape(B, K, N // K, T, H)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def run_kernel_per_device(
    kernel: Callable[[Array, Array, Array, Array], Array],
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    row_data: Int[Array, "B T"],
) -> Float[Array, "B N T H"]:
    """Run a hand-written kernel on each device of a mesh, on the device's own rows and heads.

    Compilers cannot look into such kernels, so their arguments are sharded explicitly here. The
    mesh is the one in scope, or else that of the queries. A dimension that its mesh axis does not
    divide is replicated.

    Args:
      kernel: called with the local parts of the four arrays; returns the attention output.
      q: queries.
      k: keys.
      v: values.
      row_data: one integer per position, such as its segment.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        mesh = jax.typeof(q).sharding.mesh  # the parameters' mesh
    if not mesh.empty and not mesh.manual_axes:
        batch, heads = mesh_axis("B", q.shape[0], mesh), mesh_axis("K", k.shape[1], mesh)
        spec = PartitionSpec(batch, heads)
        specs = (spec, spec, spec, PartitionSpec(batch))
        kernel = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return kernel(q, k, v, row_data)
