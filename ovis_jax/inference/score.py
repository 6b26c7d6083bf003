"""Computing the log-probabilities of given answers under the model, token by token."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from ovis_jax.argument_type_checks import check_argument_types
from ovis_jax.errors import RequestError
from ovis_jax.inference.label_logits import label_log_probs, map_label_logits
from ovis_jax.inputs.batch import PADDING_POSITION, Inputs
from ovis_jax.inputs.conversation import IGNORE_INDEX
from ovis_jax.mesh import allow_explicit_mesh
from ovis_jax.model.ovis import Ovis, Params


class Scores(NamedTuple):
    """Log-probabilities of answers, conditioned on the prompt of their row; float32, in nats.

    Attributes:
      log_probs: Log-probability of each answer, summed over its tokens; -inf for an empty answer.
      token_log_probs: Log-probability of each token, conditioned on the prompt and the answer's
        previous tokens; 0 at padding.
      token_greedy: Whether each token is the most likely token at its position; False at padding.
      lengths: Number of tokens in each answer.
    """

    log_probs: Float[Array, "B choices"]
    token_log_probs: Float[Array, "B choices n"]
    token_greedy: Bool[Array, "B choices n"]
    lengths: Int[Array, "B choices"]

    @property
    def greedy(self) -> Bool[Array, "B choices"]:
        """Whether the output of greedy `generate` would begin with exactly this answer."""
        return (self.token_greedy.sum(axis=-1) == self.lengths) & (self.lengths > 0)

    @property
    def mean_log_probs(self) -> Float[Array, "B choices"]:
        """Log-probability per token, which does not favor short answers; -inf for empty answers.

        The perplexity is exp(-mean_log_probs).
        """
        return self.log_probs / jnp.maximum(self.lengths, 1)


def score(model: Ovis, params: Params, inputs: Inputs, answers: ArrayLike) -> Scores:
    """Compute the log-probabilities of given answers to a batch of prompts.

    This is one jitted program without a loop: the decoder reads each prompt together with its
    answer. The function is pure, so it can be called inside a jitted function, inside `jax.grad`,
    or under a mesh. If a row has several answers, its crops are encoded only once, but the decoder
    reads the prompt once per answer. The program is compiled once for each shape of `inputs` and
    `answers`.

    Args:
      model: The model; static.
      params: Parameters of the model, on any device or mesh.
      inputs: The prompts, from `Processor`.
      answers: The answers as int32 [B, choices, n], from `encode_answers`: token ids, then -100 as
        padding. If a row has fewer answers than other rows, its last answers contain only padding.

    Returns:
      The `Scores` of all answers. If a prompt contains only padding, its answers are treated as
      empty.

    Raises:
      RequestError: `answers` has the wrong shape, or contains a value that is not a token id.
      TypeError: `model`, `params` or `inputs` has the wrong type.
    """
    check_argument_types(
        "score", model=(model, Ovis), params=(params, Mapping), inputs=(inputs, Inputs)
    )
    if np.ndim(answers) != 3 or 0 in np.shape(answers):
        raise RequestError(
            f"answers have the shape {list(np.shape(answers))}, expected [B, choices, n]: "
            "encode_answers creates them from texts"
        )
    if np.shape(answers)[0] != inputs.tokens.shape[0]:
        raise RequestError(
            f"answers are for {np.shape(answers)[0]} prompts, but inputs contain "
            f"{inputs.tokens.shape[0]}; give a list of answers for each prompt"
        )
    if isinstance(answers, np.ndarray | list):
        answers = _checked(np.asarray(answers), model.config.decoder.vocab_size)
    return _score(model, params, inputs, jnp.asarray(answers, jnp.int32))


def _checked(answers: np.ndarray, vocab_size: int) -> np.ndarray:
    """Check answers in host memory; arrays on a device are not checked."""
    valid = ((answers >= 0) & (answers < vocab_size)) | (answers == IGNORE_INDEX)
    if answers.dtype.kind not in "iu" or not valid.all():
        found = answers[~valid][0] if answers.dtype.kind in "iu" else answers.dtype
        raise RequestError(
            f"answers contain {found}, expected ids from 0 to {vocab_size - 1}, and {IGNORE_INDEX} "
            "as padding"
        )
    if np.any((answers[..., :-1] == IGNORE_INDEX) & (answers[..., 1:] != IGNORE_INDEX)):
        raise RequestError(
            f"answers contain {IGNORE_INDEX} before an id, expected padding only at the end"
        )
    return answers


@partial(jax.jit, static_argnums=0)
@allow_explicit_mesh
def _score(
    model: Ovis, params: Params, inputs: Inputs, answers: Int[Array, "B choices n"]
) -> Scores:
    B, choices, n = answers.shape
    positions = jnp.asarray(inputs.positions)
    prompt_lengths = jnp.max(positions, axis=1) + 1
    answers = jnp.where(prompt_lengths[:, None, None] > 0, answers, IGNORE_INDEX)
    tokens, positions = _append_answers(inputs, prompt_lengths, answers)

    pixels = jnp.asarray(inputs.pixels)
    visual = model.embed_images(params, pixels) if len(pixels) else None
    # This maps over the choices, so that the visual slots of each choice start with the first crop.
    embed = jax.vmap(lambda tokens: model.embed_inputs(params, tokens, visual), 1, 1)
    x = embed(tokens).reshape(B * choices, tokens.shape[-1], -1)  # [B choices, l, D]
    positions = positions.reshape(B * choices, -1)
    hidden = model.decode_hidden_states(params, x, positions)

    columns = jnp.maximum(prompt_lengths[:, None] - 1 + jnp.arange(n)[None], 0)  # [B, n]
    columns = jnp.repeat(columns, choices, axis=0)[..., None]
    hidden = jnp.take_along_axis(hidden, columns, axis=1)  # [B choices, n, D]

    def scores(logits: Array, labels: Array) -> tuple[Array, Array]:
        return label_log_probs(logits, labels), jnp.argmax(logits, axis=-1) == labels

    labels = answers.reshape(B * choices, n)
    results = map_label_logits(scores, model, params, hidden, labels)
    log_probs, greedy = (x.reshape(answers.shape) for x in results)
    lengths = jnp.sum(answers != IGNORE_INDEX, axis=-1, dtype=jnp.int32)
    total = jnp.where(lengths > 0, jnp.sum(log_probs, axis=-1), -jnp.inf)
    return Scores(total, log_probs, greedy, lengths)


def _append_answers(
    inputs: Inputs, prompt_lengths: Int[Array, "B"], answers: Int[Array, "B choices n"]
) -> tuple[Int[Array, "B choices l"], Int[Array, "B choices l"]]:
    """Put each answer directly after its prompt, as attention requires; return ids and positions.

    The last token of an answer is left out, because the logits at its position are not needed.
    """
    B, choices, n = answers.shape
    tokens, positions = jnp.asarray(inputs.tokens), jnp.asarray(inputs.positions)
    T, length = tokens.shape[1], tokens.shape[1] + n - 1
    column = jnp.arange(length, dtype=jnp.int32)[None]  # [1, l]
    first = jnp.argmax(positions >= 0, axis=1)  # prompts may be padded on either side
    prompt = jnp.take_along_axis(tokens, jnp.minimum(first[:, None] + column, T - 1), axis=1)
    index = column - prompt_lengths[:, None]  # [B, l], index of the answer token in each column
    clipped = jnp.broadcast_to(jnp.clip(index, 0, n - 1)[:, None], (B, choices, length))
    answer = jnp.take_along_axis(answers, clipped, axis=2)
    in_prompt = index[:, None] < 0
    in_answer = (index[:, None] >= 0) & (index[:, None] < n - 1) & (answer != IGNORE_INDEX)
    joined = jnp.where(in_prompt, prompt[:, None], answer)
    return joined, jnp.where(in_prompt | in_answer, column[None], PADDING_POSITION)
