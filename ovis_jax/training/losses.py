"""Training losses: cross-entropy on answer tokens, and DPO. Both shift labels by one position."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ovis_jax.inference.score import label_log_probs
from ovis_jax.inputs.batch import Inputs
from ovis_jax.inputs.conversation import IGNORE_INDEX


class TrainBatch(NamedTuple):
    """Conversations with labels.

    Attributes:
      inputs: model inputs, as for inference.
      labels: int32 [B, T], the token id at each position that contributes to the loss, else -100.
    """

    inputs: Inputs
    labels: Array


class PreferenceBatch(NamedTuple):
    """Preference pairs: a chosen and a rejected answer to each prompt.

    Attributes:
      chosen: the prompts with the chosen answers.
      rejected: the same prompts with the rejected answers.
      reference_chosen: float32 [B], `answer_log_probs` of `chosen` under the reference model.
      reference_rejected: float32 [B], the same for `rejected`.
    """

    chosen: TrainBatch
    rejected: TrainBatch
    reference_chosen: Array
    reference_rejected: Array


def token_log_probs(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Return the log-probability of each position's next label, and 1 where it has one, else 0."""
    # Shifting the labels instead of the logits avoids a copy of the logits.
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)
    return label_log_probs(logits, targets), (targets != IGNORE_INDEX).astype(jnp.float32)


def cross_entropy_loss(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the cross-entropy summed over answer tokens, and their number.

    The quotient is the loss that transformers' causal language models compute.
    """
    log_probs, is_target = token_log_probs(logits, labels)
    return -jnp.sum(log_probs), jnp.sum(is_target)


def answer_log_probs(logits: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Float[Array, "B"]:
    """Return the log-probability of each row's answer, summed over its tokens."""
    return jnp.sum(token_log_probs(logits, labels)[0], axis=1)


def dpo_loss(
    chosen: Float[Array, "B"],
    rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
    """Compute the loss of direct preference optimization per pair (Rafailov et al. 2023, eq. 7).

    Args:
      chosen: log-probabilities of the chosen answers.
      rejected: log-probabilities of the rejected answers.
      reference_chosen: log-probabilities of the chosen answers under the reference model.
      reference_rejected: the same for the rejected answers.
      beta: strength of the penalty on departing from the reference model.
      label_smoothing: assumed share of pairs with swapped answers (conservative DPO, Mitchell
        2023).
    """
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    right, swapped = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * swapped
