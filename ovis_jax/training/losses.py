"""Losses over the tokens of answers. Labels stand at their own position and are shifted here."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ovis_jax.inference.score import label_log_probs
from ovis_jax.inputs.batch import Inputs
from ovis_jax.inputs.conversation import IGNORED


class Batch(NamedTuple):
    """Conversations to learn the answers of.

    Attributes:
      inputs: as for inference.
      labels: int32 [B, T]: the token at each position that is learned, elsewhere -100.
    """

    inputs: Inputs
    labels: Array


class Pairs(NamedTuple):
    """For each prompt an answer that is preferred and one that is not.

    Attributes:
      chosen: the preferred answers.
      rejected: the others, row by row for the same prompts.
      reference_chosen: float32 [B], `answer_log_probs` under the frozen reference model.
      reference_rejected: float32 [B].
    """

    chosen: Batch
    rejected: Batch
    reference_chosen: Array
    reference_rejected: Array


def token_log_probs(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of the label after each position, and 1 where there is one, else 0."""
    # Labels move, not logits: so no copy of the logits is made.
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    return label_log_probs(logits, targets), (targets != IGNORED).astype(jnp.float32)


def supervised(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy summed over answer tokens, and how many there are; their ratio is the loss.

    The mean over all answer tokens of a batch is what transformers' causal models compute.
    """
    log_probs, learned = token_log_probs(logits, labels)
    return -jnp.sum(log_probs), jnp.sum(learned)


def answer_log_probs(logits: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Float[Array, "B"]:
    """Log-probability of each row's whole answer."""
    return jnp.sum(token_log_probs(logits, labels)[0], axis=1)


def dpo(
    chosen: Float[Array, "B"],
    rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7), a loss a pair.

    All arguments are log-probabilities of whole answers. `label_smoothing` is the share of pairs
    whose labels are taken to be the wrong way round (conservative DPO, Mitchell 2023).
    """
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong
