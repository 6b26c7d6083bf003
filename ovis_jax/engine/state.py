"""The arrays of running requests, and the pure functions on them.

Each sequence has a slot, which is a row of `DecodeState`. A prompt is prefilled in chunks of a
fixed shape, directly into the cache of its slot. Several prompts may be prefilled at a time; each
of them has a lane, which holds the embeddings of its visual tokens. `runner.py` compiles these
functions.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int, Key, UInt32

from ovis_jax.engine.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from ovis_jax.inference.sampling import MAX_TOP_K, Sampling, derive_image_key, sample
from ovis_jax.inputs.image_processing import IMAGE_SLOT
from ovis_jax.model.cpu import update_slice
from ovis_jax.model.kv_cache import Cache
from ovis_jax.model.ovis import Ovis, Params

SamplingMode = Literal["greedy", "temperature", "full"]
"""The sampling steps in a decode program: none (greedy), only the temperature, or all steps and the
top log-probabilities. Every mode that supports a row's sampling parameters samples the same
token."""

NEUTRAL_SAMPLING = Sampling(
    temperature=0.0,
    top_k=MAX_TOP_K,
    top_p=1.0,
    repetition_penalty=1.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
    min_p=0.0,
)
"""Values without effect on the sampled tokens."""

UNUSED_ID = np.iinfo(np.int32).max
"""The id in unused entries of `SamplingParams`."""

MAX_EOS_IDS = 16
"""Maximum number of stop ids of a checkpoint."""

MAX_TOP_LOGPROBS = 20
"""Number of most likely tokens reported per position, which is the maximum in OpenAI's API."""


class SamplingParams(NamedTuple):
    """Sampling parameters as arrays, for one sequence or, with a leading axis, for all slots.

    Every parameter always has a value, so changing the parameters causes no recompilation. The
    first seven are those of `Sampling`, in its order.
    """

    temperature: Float[ArrayLike, "*B"]
    top_k: Int[ArrayLike, "*B"]
    top_p: Float[ArrayLike, "*B"]
    repetition_penalty: Float[ArrayLike, "*B"]
    frequency_penalty: Float[ArrayLike, "*B"]
    presence_penalty: Float[ArrayLike, "*B"]
    min_p: Float[ArrayLike, "*B"]
    logit_bias: tuple[Int[ArrayLike, "*B biases"], Float[ArrayLike, "*B biases"]]
    """Token ids and the numbers that are added to their logits; unused entries have UNUSED_ID."""
    stop_ids: Int[ArrayLike, "*B stops"]
    """Ids that end the sequence; unused entries have UNUSED_ID."""
    min_tokens: Int[ArrayLike, "*B"]
    """Number of tokens before which no stop id is sampled."""
    seed: UInt32[ArrayLike, "*B 2"]
    """The low and the high 32 bits of a 64-bit seed."""
    choice: Int[ArrayLike, "*B"]
    """The index of the sequence within its request. Each sequence samples with its own key."""


class SampledTokens(NamedTuple):
    """The tokens sampled in one step."""

    tokens: Int[Array, "B"]
    logprobs: Float[Array, "B"]
    """Log-probabilities under the model, before any sampling parameter is applied. A constraint is
    applied, so they are those of the allowed tokens."""
    top: tuple[Int[Array, "B n"], Float[Array, "B n"]] | None
    """The most likely tokens and their log-probabilities; None unless the mode is "full"."""


class SequenceState(NamedTuple):
    """What is known of each slot's sequence beside its cache, with one row per slot."""

    last_tokens: Int[Array, "B"]
    num_tokens: Int[Array, "B"]
    """Number of tokens generated in each row."""
    counts: Int[Array, "B V"]
    """How often each token was generated in each row; updated only in the mode "full"."""
    params: SamplingParams


class DecodeState(NamedTuple):
    """The state of all slots, with one row per slot."""

    cache: Cache
    sequences: SequenceState


def make_sampling_params(
    sampling: Sampling,
    seed: int,
    choice: int,
    *,
    logit_bias: Sequence[tuple[int, float]] = (),
    stop_ids: Sequence[int] = (),
    min_tokens: int = 0,
) -> SamplingParams:
    """Convert sampling parameters to arrays, with a neutral value for each parameter that is None.

    Args:
      sampling: Sampling parameters as plain numbers.
      seed: Seed of the request, from 0 to 2**64 - 1.
      choice: The index of the sequence within its request.
      logit_bias: Token ids and the numbers that are added to their logits.
      stop_ids: Ids that end the sequence.
      min_tokens: Number of tokens before which no stop id is sampled.
    """
    given = {name: value for name, value in vars(sampling).items() if value is not None}
    values = replace(NEUTRAL_SAMPLING, **given).map(np.asarray)
    bias_ids, biases = zip(*logit_bias, strict=True) if logit_bias else ((), ())
    return SamplingParams(
        **vars(values),
        logit_bias=(
            _pad(bias_ids, MAX_LOGIT_BIAS, UNUSED_ID, np.int32),
            _pad(biases, MAX_LOGIT_BIAS, 0.0, np.float32),
        ),
        stop_ids=_pad(stop_ids, MAX_STOP_TOKEN_IDS + MAX_EOS_IDS, UNUSED_ID, np.int32),
        min_tokens=np.asarray(min_tokens, np.int32),
        seed=split_seed(seed),
        choice=np.asarray(choice, np.int32),
    )


def _pad(
    values: Sequence[int | float], length: int, fill: int | float, dtype: DTypeLike
) -> np.ndarray:
    return np.asarray([*values, *[fill] * (length - len(values))], dtype)


def split_seed(seed: int) -> UInt32[np.ndarray, "2"]:
    """Return the low and the high 32 bits of a 64-bit seed."""
    return np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint32)


def make_key(seed: UInt32[ArrayLike, "2"], choice: Int[ArrayLike, ""]) -> Key[Array, ""]:
    """Return the random key of a sequence.

    For choice 0 and a seed below 2**32, the key is `jax.random.key(seed)`, so the sequence has the
    same tokens as `generate` with that key.
    """
    seed = jnp.asarray(seed)
    key = jax.random.key(seed[0])
    for number in (seed[1], jnp.asarray(choice)):
        same = jax.random.clone(key)  # with jax_debug_key_reuse, a key may be used once
        key = jax.lax.select(number == 0, same, jax.random.fold_in(key, number))
    return key


def sample_tokens(
    logits: Float[Array, "B V"],
    params: SamplingParams,
    counts: Int[Array, "B V"],
    num_tokens: Int[Array, "B"],
    mode: SamplingMode,
    masks: UInt32[Array, "B n"] | None = None,
) -> SampledTokens:
    """Sample one token per row, with each row's own sampling parameters and key.

    Args:
      logits: Float32 logits.
      params: Sampling parameters of each row.
      counts: How often each token was generated in each row.
      num_tokens: Number of tokens generated so far, which is folded into the key.
      mode: Which sampling steps to run.
      masks: The tokens that each row's constraint allows, one bit per token id; None if no row has
        a constraint. Log-probabilities are those of the allowed tokens.
    """
    if masks is not None:
        bits = masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None] & 1
        allowed = bits.reshape(len(bits), -1)[:, : logits.shape[1]] == 1
        logits = jnp.where(allowed, logits, -jnp.inf)
    if mode == "greedy":
        tokens = sample(logits, Sampling())
    else:

        def sample_row(logits: Array, row: SamplingParams, counts: Array, step: Array) -> Array:
            key = jax.random.fold_in(make_key(row.seed, row.choice), step)
            if mode == "temperature":
                return sample(logits[None], Sampling(row.temperature), None, key)[0]
            ids, biases = row.logit_bias
            logits = logits.at[ids].add(biases, mode="drop")  # an UNUSED_ID is out of bounds
            suppressed = jnp.where(step < row.min_tokens, -jnp.inf, jnp.float32(0))
            remaining = logits.at[row.stop_ids].add(suppressed, mode="drop")
            if masks is not None:  # a constraint may allow nothing but a stop id
                remaining = jnp.where(jnp.all(jnp.isneginf(remaining)), logits, remaining)
            logits = remaining
            return sample(logits[None], Sampling(*row[:7]), counts[None], key)[0]

        tokens = jax.vmap(sample_row)(logits, params, counts, num_tokens)
    all_logprobs = jax.nn.log_softmax(logits)
    logprobs = jnp.take_along_axis(all_logprobs, tokens[:, None], axis=1)[:, 0]
    top = None
    if mode == "full":
        values, ids = jax.lax.top_k(all_logprobs, min(MAX_TOP_LOGPROBS, logits.shape[1]))
        top = ids, values
    return SampledTokens(tokens, logprobs, top)


def encode_crops(
    model: Ovis,
    params: Params,
    visual: Float[Array, "lanes rows D"],
    pixels: Float[Array, "n h w C"],
    lanes: Int[Array, "n"],
    rows: Int[Array, "n"],
    seeds: UInt32[Array, "n 2"],
) -> tuple[Float[Array, "lanes rows D"], tuple[Float[Array, "M D"], ...]]:
    """Compute the visual embeddings of crops, and write them into the lanes of their prompts.

    Args:
      model: The model.
      params: Parameters of the model.
      visual: The visual embeddings in each lane.
      pixels: Normalized crops.
      lanes: The lane of each crop.
      rows: Index of each crop's first visual token in its prompt.
      seeds: Seed of each crop's prompt. It only matters to models that sample their visual words.

    Returns:
      The new `visual`, and the embeddings of each crop.
    """
    if model.config.visual_tokenizer.tokenize_function == "gumbel_argmax":

        def encode(pixels: Array, row: Array, seed: Array) -> Array:
            key = jax.random.fold_in(derive_image_key(make_key(seed, 0)), row)
            return model.embed_images(params, pixels[None], key)[0]

        embeddings = [encode(*crop) for crop in zip(pixels, rows, seeds, strict=True)]
    else:
        embeddings = list(model.embed_images(params, pixels))
    for lane, row, values in zip(lanes, rows, embeddings, strict=True):
        visual = add_visual_embeddings(visual, values, lane, row)
    return visual, tuple(embeddings)


def add_visual_embeddings(
    visual: Float[Array, "lanes rows D"],
    embeddings: Float[Array, "M D"],
    lane: Int[ArrayLike, ""],
    row: Int[ArrayLike, ""],
) -> Float[Array, "lanes rows D"]:
    """Write the visual embeddings of a crop into a lane, starting at `row`."""
    return update_slice(visual, embeddings[None], (lane, row, 0))


def copy_cache(
    state: DecodeState, source: Int[ArrayLike, ""], target: Int[ArrayLike, ""]
) -> DecodeState:
    """Copy the cache of a slot to another slot, so that a second sequence can continue it."""

    def copy(rows: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(rows, source, 1, axis=0)
        return update_slice(rows, row, (target, *[0] * (rows.ndim - 1)))

    return state._replace(cache=jax.tree.map(copy, state.cache))


def prefill_chunks(
    model: Ovis,
    params: Params,
    state: DecodeState,
    visual: Float[Array, "lanes rows D"],
    tokens: Int[Array, "n T"],
    positions: Int[Array, "n T"],
    slots: Int[Array, "n"],
    lanes: Int[Array, "n"],
    rows: Int[Array, "n"],
) -> tuple[DecodeState, Float[Array, "n V"]]:
    """Prefill the next chunk of n prompts.

    Args:
      model: The model.
      params: Parameters of the model.
      state: The state of all slots. Cache entries at or after a chunk's first position are ignored.
      visual: The visual embeddings in each lane.
      tokens: Token ids of the chunks, padded on the right.
      positions: Positions of these tokens in their prompts; -1 at padding.
      slots: The slot of each prompt.
      lanes: The lane of each prompt.
      rows: Index of each chunk's first visual token in its prompt.

    Returns:
      The new state, and the float32 logits at each chunk's last position.
    """
    order = jnp.cumsum((tokens == IMAGE_SLOT).astype(jnp.int32), axis=1) - 1
    index = jnp.maximum(rows[:, None] + order, 0)  # [n, T]
    chunk_visual = visual[lanes[:, None], index]  # [n, T, D]
    logits, cache = model.extend(params, tokens, positions, chunk_visual, state.cache, slots)
    return state._replace(cache=cache), logits


def start_sequences(
    state: SequenceState,
    logits: Float[Array, "m V"],
    slots: Int[Array, "n"],
    rows: Int[Array, "n"],
    sampling_params: SamplingParams,
    masks: UInt32[Array, "n words"],
) -> tuple[SequenceState, SampledTokens]:
    """Start sequences in slots whose cache contains their prompts, and sample their first tokens.

    Args:
      state: The state of all slots, without the cache.
      logits: Logits at the last positions of m prompts.
      slots: The slot of each sequence.
      rows: The row of `logits` for each sequence.
      sampling_params: Sampling parameters of each sequence.
      masks: The tokens that each sequence's constraint allows, one bit per token id.
    """
    logits = logits[rows]
    counts = jnp.zeros(logits.shape, jnp.int32)
    num_tokens = jnp.zeros(slots.shape, jnp.int32)
    sampled = sample_tokens(logits, sampling_params, counts, num_tokens, "full", masks)
    counts = counts.at[jnp.arange(len(slots), dtype=jnp.int32), sampled.tokens].set(1)
    values = SequenceState(sampled.tokens, num_tokens + 1, counts, sampling_params)
    return jax.tree.map(lambda old, new: old.at[slots].set(new), state, values), sampled


def decode(
    model: Ovis,
    mode: SamplingMode,
    params: Params,
    state: DecodeState,
    active: Bool[Array, "B"],
    masks: UInt32[Array, "B n"] | None = None,
) -> tuple[DecodeState, SampledTokens]:
    """Generate one token in every active slot; the other slots do not advance.

    Args:
      model: The model.
      mode: Which sampling steps to run.
      params: Parameters of the model.
      state: The state of all slots.
      active: Which slots are active.
      masks: The tokens that each slot's constraint allows, as in `sample_tokens`.
    """
    lengths, old = state.cache.lengths, state.sequences
    logits, cache = model.decode(params, old.last_tokens, state.cache)
    cache = cache._replace(lengths=jnp.where(active, cache.lengths, lengths))
    sampled = sample_tokens(logits, old.params, old.counts, old.num_tokens, mode, masks)
    counts, steps = old.counts, active.astype(jnp.int32)
    if mode == "full":
        counts = counts.at[jnp.arange(len(lengths)), sampled.tokens].add(steps)
    last_tokens = jnp.where(active, sampled.tokens, old.last_tokens)
    sequences = SequenceState(last_tokens, old.num_tokens + steps, counts, old.params)
    return DecodeState(cache, sequences), sampled


def init_decode_state(
    model: Ovis, num_slots: int, max_length: int, dtype: DTypeLike
) -> DecodeState:
    """Return a state with empty slots for sequences of up to `max_length` positions."""
    params = make_sampling_params(Sampling(), 0, 0)
    sequences = SequenceState(
        jnp.zeros((num_slots,), jnp.int32),
        jnp.zeros((num_slots,), jnp.int32),
        jnp.zeros((num_slots, model.config.decoder.vocab_size), jnp.int32),
        jax.tree.map(lambda x: jnp.broadcast_to(x, (num_slots, *x.shape)), params),
    )
    return DecodeState(model.empty_cache(num_slots, max_length, dtype), sequences)


def init_visual(
    model: Ovis, num_lanes: int, num_visual_tokens: int, dtype: DTypeLike
) -> Float[Array, "lanes rows D"]:
    """Return empty lanes, each for the visual embeddings of up to `num_visual_tokens` tokens."""
    return jnp.zeros((num_lanes, num_visual_tokens, model.config.decoder.width), dtype)
