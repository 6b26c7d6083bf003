"""Attention from absolute positions: who sees whom, and the weighted sum."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from ovis_jax.model.layers import exact, softcap

MASKED = jnp.finfo(jnp.float32).min
"""The score of a hidden key: finite, so that a row that sees nothing stays free of NaN."""


def visible(
    query_positions: Int[Array, "B T"], key_positions: Int[Array, "B S"], window: int | None
) -> Bool[Array, "B T S"]:
    """Which keys a query sees: itself and what came before, at most `window` positions in all.

    A key position of -1 marks padding or an empty cache slot, which nobody sees.
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

    Scores, soft cap and softmax are float32; the weights are rounded to the dtype of `q`.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    # Heads stand before positions in both products: the one order that XLA's CPU backend has for
    # bfloat16 operands and a float32 result. G and T are one axis Q in them: so their gradients sum
    # over one axis too, which needs no transposed copy of the scores.
    grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    grouped = grouped.reshape(B, K, -1, H)  # [B, K, Q, H]
    scores = jnp.einsum(
        "BKQH,BKSH->BKQS", grouped, k, precision=exact(q), preferred_element_type=jnp.float32
    )
    scores = scores * scale if cap is None else softcap(scores * scale, cap)
    if mask is not None:
        scores = scores.reshape(B, K, N // K, T, -1)
        scores = jnp.where(mask[:, None, None], scores, MASKED).reshape(B, K, N // K * T, -1)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum(
        "BKQS,BKSH->BKQH", weights, v, precision=exact(q), preferred_element_type=jnp.float32
    )
    out = out.astype(q.dtype).reshape(B, K, N // K, T, H)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
