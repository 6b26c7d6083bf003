"""How likely given answers are: their log-probabilities under the model, token by token."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from ovis_jax.errors import RequestError
from ovis_jax.inputs.batch import PADDING, Inputs
from ovis_jax.inputs.conversation import IGNORED
from ovis_jax.mesh_axes import under_any_mesh
from ovis_jax.model.decoder import Decoder, unembed
from ovis_jax.model.ovis import Ovis, Params, apply


class Scores(NamedTuple):
    """How likely each answer is to its row's prompt, float32, in nats."""

    log_probs: Float[Array, "B choices"]
    """Of the whole answer: the sum over its tokens; -inf where a row has no such answer."""
    token_log_probs: Float[Array, "B choices N"]
    """Of each token, given the prompt and the tokens before it; 0 at padding."""
    token_greedy: Bool[Array, "B choices N"]
    """Whether each token is the likeliest one there; False at padding."""
    lengths: Int[Array, "B choices"]
    """How many tokens of each answer count."""

    @property
    def greedy(self) -> Bool[Array, "B choices"]:
        """Whether `generate` would begin with just this answer when greedy."""
        return (self.token_greedy.sum(axis=-1) == self.lengths) & (self.lengths > 0)

    @property
    def mean_log_probs(self) -> Float[Array, "B choices"]:
        """Log-probability a token, which does not favour short answers; -inf where there is none.

        Its exponential, the sign turned, is the perplexity.
        """
        return self.log_probs / jnp.maximum(self.lengths, 1)


def score(model: Ovis, params: Params, inputs: Inputs, answers: ArrayLike) -> Scores:
    """Log-probabilities of given answers to prompts.

    One jitted program and no loop: every answer is read behind its prompt at once. Pure, so it may
    be called inside the caller's own `jax.jit`, `grad` or mesh. Crops are looked at once however
    many answers a row has; the decoder reads the prompt once for each. It compiles once for each
    shape of `inputs` and `answers`.

    Args:
      model: static.
      params: of the model, on any device or mesh.
      inputs: the prompts, from `Processor`.
      answers: int32 [B, choices, N] from `encode_answers`: ids, -100 behind them. A row with fewer
        answers than others ends with answers of nothing but -100.

    Returns:
      `Scores`. A prompt that is nothing but padding has no answers.

    Raises:
      RequestError: `answers` are not of this shape, or hold what is not the id of a token.
    """
    if np.ndim(answers) != 3 or 0 in np.shape(answers):
        raise RequestError(
            f"answers have the shape {list(np.shape(answers))}, expected [B, choices, N]: "
            "encode_answers makes them from texts"
        )
    if np.shape(answers)[0] != inputs.tokens.shape[0]:
        raise RequestError(
            f"answers are for {np.shape(answers)[0]} prompts, but inputs hold "
            f"{inputs.tokens.shape[0]}; give a list of answers for each prompt"
        )
    if isinstance(answers, np.ndarray | list):
        answers = _checked(np.asarray(answers), model.config.decoder.vocab_size)
    return _score(model, params, inputs, jnp.asarray(answers, jnp.int32))


def label_log_probs(
    logits: Float[Array, "*rows V"], labels: Int[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """Log-probability of one label under each distribution; 0 where the label is -100."""
    # A label is picked by comparison: so, where V is sharded, no logits are gathered.
    logits -= jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    chosen = labels[..., None] == jnp.arange(logits.shape[-1])
    log_probs = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    log_probs -= jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
    return jnp.where(labels != IGNORED, log_probs, 0.0)


def _checked(answers: np.ndarray, vocab_size: int) -> np.ndarray:
    """Answers that the caller holds on the host; those on a device are taken as they are."""
    known = ((answers >= 0) & (answers < vocab_size)) | (answers == IGNORED)
    if answers.dtype.kind not in "iu" or not known.all():
        found = answers[~known][0] if answers.dtype.kind in "iu" else answers.dtype
        raise RequestError(
            f"answers hold {found}, expected ids from 0 to {vocab_size - 1}, and {IGNORED} as "
            "padding"
        )
    if np.any((answers[..., :-1] == IGNORED) & (answers[..., 1:] != IGNORED)):
        raise RequestError(f"answers hold {IGNORED} before an id, expected padding behind them")
    return answers


@partial(jax.jit, static_argnums=0)
@under_any_mesh
def _score(
    model: Ovis, params: Params, inputs: Inputs, answers: Int[Array, "B choices N"]
) -> Scores:
    B, choices, N = answers.shape
    positions = jnp.asarray(inputs.positions)
    prompt_lengths = jnp.max(positions, axis=1) + 1
    answers = jnp.where(prompt_lengths[:, None, None] > 0, answers, IGNORED)
    joined, joined_positions = _join(inputs, prompt_lengths, answers)

    pixels = jnp.asarray(inputs.pixels)
    visual = model.embed_crops(params, pixels) if len(pixels) else None
    # Mapped over the choices, so that the slots of each one count from the first crop on.
    embed = jax.vmap(lambda tokens: model.embed_inputs(params, tokens, visual), 1, 1)
    x = embed(joined).reshape(B * choices, joined.shape[-1], -1)  # [B choices, L, D]
    decoder = Decoder(model.config.decoder, remat=model.remat, attention=model.attention)
    rows = joined_positions.reshape(B * choices, -1)
    # The decoder's own logits, of every position, are read by nobody and so not computed.
    hidden = apply(decoder, params["decoder"], x, rows).hidden_states[-1]

    columns = jnp.maximum(prompt_lengths[:, None] - 1 + jnp.arange(N), 0)  # [B, N]
    columns = jnp.repeat(columns, choices, axis=0)[..., None]
    table = params["decoder"]["embed" if model.config.decoder.tie_embeddings else "unembed"]
    logits = unembed(
        model.config.decoder,
        jnp.take_along_axis(hidden, columns, axis=1),  # [B choices, N, D]
        params["decoder"]["final_norm"],
        table,
    )
    labels = answers.reshape(B * choices, N)
    log_probs = label_log_probs(logits, labels).reshape(answers.shape)
    greedy = (jnp.argmax(logits, axis=-1) == labels).reshape(answers.shape)
    lengths = jnp.sum(answers != IGNORED, axis=-1)
    total = jnp.where(lengths > 0, jnp.sum(log_probs, axis=-1), -jnp.inf)
    return Scores(total, log_probs, greedy, lengths)


def _join(
    inputs: Inputs, prompt_lengths: Int[Array, "B"], answers: Int[Array, "B choices N"]
) -> tuple[Int[Array, "B choices L"], Int[Array, "B choices L"]]:
    """Each answer directly behind its prompt, as attention needs it, and the positions.

    The last token of an answer is not read: nothing is asked of what follows it.
    """
    B, choices, N = answers.shape
    tokens, positions = jnp.asarray(inputs.tokens), jnp.asarray(inputs.positions)
    T, L = tokens.shape[1], tokens.shape[1] + N - 1
    column = jnp.arange(L)
    first = jnp.argmax(positions >= 0, axis=1)  # a prompt may be padded on either side
    prompt = jnp.take_along_axis(tokens, jnp.minimum(first[:, None] + column, T - 1), axis=1)
    behind = column - prompt_lengths[:, None]  # [B, L]
    place = jnp.broadcast_to(jnp.clip(behind, 0, N - 1)[:, None], (B, choices, L))
    said = jnp.take_along_axis(answers, place, axis=2)
    in_prompt = behind[:, None] < 0
    in_answer = (behind[:, None] >= 0) & (behind[:, None] < N - 1) & (said != IGNORED)
    joined = jnp.where(in_prompt, prompt[:, None], said)
    return joined, jnp.where(in_prompt | in_answer, column, PADDING)
