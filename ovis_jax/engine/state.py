"""The arrays of running requests, and the pure functions on them.

Each sequence has a slot, which is a row of `DecodeState`. A prompt is prefilled in chunks of a
fixed shape. The resulting cache in `PrefillState` is then inserted into a slot. `runner.py`
compiles these functions.
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


class DecodeState(NamedTuple):
    """The state of all slots, with one row per slot."""

    cache: Cache
    last_tokens: Int[Array, "B"]
    num_tokens: Int[Array, "B"]
    """Number of tokens generated in each row."""
    counts: Int[Array, "B V"]
    """How often each token was generated in each row; updated only in the mode "full"."""
    params: SamplingParams


class PrefillState(NamedTuple):
    """The prompt that is being prefilled."""

    cache: Cache
    visual: Float[Array, "rows D"]
    """The embeddings of the prompt's visual tokens in order, then unused rows for one chunk."""


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


def encode_image(
    model: Ovis,
    params: Params,
    pixels: Float[Array, "h w C"],
    row: Int[ArrayLike, ""],
    seed: UInt32[Array, "2"],
) -> Float[Array, "M D"]:
    """Compute the visual embeddings of a crop; `row` is the index of its first visual token.

    The row and the seed only matter to models that sample their visual words.
    """
    key = jax.random.fold_in(derive_image_key(make_key(seed, 0)), row)
    return model.embed_images(params, pixels[None], key)[0]


def add_visual_embeddings(
    state: PrefillState, embeddings: Float[Array, "M D"], row: Int[ArrayLike, ""]
) -> PrefillState:
    """Write the visual embeddings of a crop into `state.visual`, starting at `row`."""
    return state._replace(visual=update_slice(state.visual, embeddings, row, axis=0))


def reuse_cache(state: PrefillState, cache: Cache, slot: Int[ArrayLike, ""]) -> PrefillState:
    """Copy the cache of a slot, so that a prompt with the same beginning can continue it."""
    row = jax.tree.map(lambda rows: jax.lax.dynamic_slice_in_dim(rows, slot, 1, axis=0), cache)
    return state._replace(cache=row)


def prefill_chunk(
    model: Ovis,
    params: Params,
    state: PrefillState,
    tokens: Int[Array, "1 T"],
    positions: Int[Array, "1 T"],
    row: Int[ArrayLike, ""],
) -> tuple[PrefillState, Float[Array, "1 V"]]:
    """Prefill the next chunk of a prompt.

    Args:
      model: The model.
      params: Parameters of the model.
      state: The state after the previous chunk. Cache entries from an earlier prompt are ignored,
        because positions start at 0 again.
      tokens: Token ids of the chunk, padded on the right.
      positions: Positions of these tokens in the prompt; -1 at padding.
      row: Row of `state.visual` with the embedding of the chunk's first visual token.

    Returns:
      The new state, and the float32 logits at the chunk's last position.
    """
    T = tokens.shape[1]
    visual = jax.lax.dynamic_slice_in_dim(state.visual, row, T, axis=0)
    logits, cache = model.extend(params, tokens, positions, visual[None], state.cache)
    return PrefillState(cache, state.visual), logits


def insert_and_sample(
    state: DecodeState,
    slot: Int[ArrayLike, ""],
    cache: Cache,
    logits: Float[Array, "1 V"],
    sampling_params: SamplingParams,
    mask: UInt32[Array, "n"],
) -> tuple[DecodeState, SampledTokens]:
    """Start a sequence in a slot, and sample its first token.

    Args:
      state: The state of all slots.
      slot: Index of the slot.
      cache: Cache of the prompt, with a single row.
      logits: Logits at the prompt's last position.
      sampling_params: Sampling parameters of the sequence.
      mask: The tokens that the sequence's constraint allows, one bit per token id.
    """
    params = jax.tree.map(lambda x: jnp.asarray(x)[None], sampling_params)
    counts = jnp.zeros(logits.shape, jnp.int32)
    num_tokens = jnp.zeros((1,), jnp.int32)
    sampled = sample_tokens(logits, params, counts, num_tokens, "full", mask[None])
    counts = counts.at[0, sampled.tokens[0]].set(1)
    row = DecodeState(cache, sampled.tokens, jnp.ones((1,), jnp.int32), counts, params)

    def put(rows: Array, row: Array) -> Array:
        return update_slice(rows, row, slot, axis=0)

    return jax.tree.map(put, state, row), sampled


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
    lengths = state.cache.lengths
    logits, cache = model.decode(params, state.last_tokens, state.cache)
    cache = cache._replace(lengths=jnp.where(active, cache.lengths, lengths))
    sampled = sample_tokens(logits, state.params, state.counts, state.num_tokens, mode, masks)
    counts, steps = state.counts, active.astype(jnp.int32)
    if mode == "full":
        counts = counts.at[jnp.arange(len(lengths)), sampled.tokens].add(steps)
    last_tokens = jnp.where(active, sampled.tokens, state.last_tokens)
    num_tokens = state.num_tokens + steps
    return DecodeState(cache, last_tokens, num_tokens, counts, state.params), sampled


def init_decode_state(
    model: Ovis, num_slots: int, max_length: int, dtype: DTypeLike
) -> DecodeState:
    """Return a state with empty slots for sequences of up to `max_length` positions."""
    params = make_sampling_params(Sampling(), 0, 0)
    return DecodeState(
        model.empty_cache(num_slots, max_length, dtype),
        jnp.zeros((num_slots,), jnp.int32),
        jnp.zeros((num_slots,), jnp.int32),
        jnp.zeros((num_slots, model.config.decoder.vocab_size), jnp.int32),
        jax.tree.map(lambda x: jnp.broadcast_to(x, (num_slots, *x.shape)), params),
    )


def init_prefill_state(
    model: Ovis, num_visual_tokens: int, max_length: int, dtype: DTypeLike
) -> PrefillState:
    """Return an empty state for a prompt of up to `max_length` positions and its visual tokens."""
    cache = model.empty_cache(1, max_length, dtype)
    visual = jnp.zeros((num_visual_tokens, model.config.decoder.width), dtype)
    return PrefillState(cache, visual)
