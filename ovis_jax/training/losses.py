"""Training losses: cross-entropy on answer tokens, and DPO. Both shift the labels by one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ovis_jax.inference.label_logits import label_log_probs, map_label_logits
from ovis_jax.inputs.batch import Inputs
from ovis_jax.inputs.conversation import IGNORE_INDEX
from ovis_jax.model.ovis import Ovis, Params


class TrainBatch(NamedTuple):
    """Conversations with labels.

    Attributes:
      inputs: Model inputs, in the same form as for inference.
      labels: Labels, int32 [B, T]: the token id at positions that contribute to the loss, -100
        elsewhere.
    """

    inputs: Inputs
    labels: Array


class PreferenceBatch(NamedTuple):
    """Preference pairs, each with a chosen and a rejected answer to the same prompt.

    Attributes:
      chosen: The prompts with the chosen answers.
      rejected: The same prompts with the rejected answers.
      reference_chosen: Log-probabilities of the chosen answers under the reference model, float32
        [B].
      reference_rejected: Log-probabilities of the rejected answers under the reference model,
        float32 [B].
    """

    chosen: TrainBatch
    rejected: TrainBatch
    reference_chosen: Array
    reference_rejected: Array


def token_log_probs(
    model: Ovis, params: Params, hidden: Float[Array, "B T D"], labels: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Return the log-probability of the next label at each position, and a mask of the labels.

    The logits are computed in chunks, only at positions before a label.
    """
    # Shifting the labels instead of the hidden states avoids a copy of the hidden states.
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)
    log_probs = map_label_logits(label_log_probs, model, params, hidden, targets)
    return log_probs, (targets != IGNORE_INDEX).astype(jnp.float32)


def cross_entropy_sum_and_count(
    model: Ovis, params: Params, hidden: Float[Array, "B T D"], labels: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the cross-entropy summed over answer tokens, and the number of these tokens.

    The first result divided by the second is the loss of causal language models in transformers.

    Args:
      model: The model.
      params: Parameters of the complete model.
      hidden: Output of the last decoder block, from `Ovis.last_hidden_states`.
      labels: Labels, as in `TrainBatch`.
    """
    log_probs, is_target = token_log_probs(model, params, hidden, labels)
    return -jnp.sum(log_probs), jnp.sum(is_target)


def answer_log_probs(
    model: Ovis, params: Params, hidden: Float[Array, "B T D"], labels: Int[Array, "B T"]
) -> Float[Array, "B"]:
    """Return the log-probability of each row's answer, summed over its tokens.

    The arguments are those of `cross_entropy_sum_and_count`.
    """
    return jnp.sum(token_log_probs(model, params, hidden, labels)[0], axis=1)


def dpo_losses(
    chosen: Float[Array, "B"],
    rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
    """Compute the DPO loss for each pair (Rafailov et al. 2023, eq. 7).

    Args:
      chosen: Log-probabilities of the chosen answers.
      rejected: Log-probabilities of the rejected answers.
      reference_chosen: Log-probabilities of the chosen answers under the reference model.
      reference_rejected: Log-probabilities of the rejected answers under the reference model.
      beta: Strength of the penalty for deviating from the reference model.
      label_smoothing: Assumed fraction of pairs in which the answers are swapped (conservative DPO,
        Mitchell 2023).
    """
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    right, swapped = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * swapped
