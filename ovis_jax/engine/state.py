"""The arrays of running requests, and the pure functions on them.

Each sequence has a slot, which is a row of `DecodeState`. A prompt is prefilled in chunks of a
fixed shape. The resulting cache in `PrefillState` is then inserted into a slot. `runner.py`
compiles these functions.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int, Key, UInt32

from ovis_jax.config import DecoderConfig
from ovis_jax.inference.sampling import MAX_TOP_K, Sampling, derive_image_key, sample
from ovis_jax.model import kv_cache
from ovis_jax.model.kv_cache import Cache
from ovis_jax.model.ovis import Ovis, Params

SamplingMode = Literal["greedy", "temperature", "full"]
"""The sampling steps in a decode program: none (greedy), only the temperature, or all steps and the
top log-probabilities. Every mode that supports a row's sampling parameters samples the same
token."""

MAX_TOP_LOGPROBS = 20
"""Number of most likely tokens reported per position, which is the maximum in OpenAI's API."""


class SamplingParams(NamedTuple):
    """Sampling parameters as arrays, for one sequence or, with a leading axis, for all slots.

    Every parameter always has a value, so changing the parameters causes no recompilation.
    """

    temperature: Float[ArrayLike, "*B"]
    top_k: Int[ArrayLike, "*B"]
    top_p: Float[ArrayLike, "*B"]
    repetition_penalty: Float[ArrayLike, "*B"]
    seed: UInt32[ArrayLike, "*B 2"]
    """The low and the high 32 bits of a 64-bit seed."""
    choice: Int[ArrayLike, "*B"]
    """The index of the sequence within its request. Each sequence samples with its own key."""


class SampledTokens(NamedTuple):
    """The tokens sampled in one step."""

    tokens: Int[Array, "B"]
    logprobs: Float[Array, "B"]
    """Log-probabilities under the model, before any sampling parameter is applied."""
    top: tuple[Int[Array, "B n"], Float[Array, "B n"]] | None
    """The most likely tokens and their log-probabilities; None unless the mode is "full"."""


class DecodeState(NamedTuple):
    """The state of all slots, with one row per slot."""

    cache: Cache
    last_tokens: Int[Array, "B"]
    num_tokens: Int[Array, "B"]
    """Number of tokens generated in each row."""
    seen: Bool[Array, "B V"]
    """Which tokens have been generated in each row; updated only in the mode "full"."""
    params: SamplingParams


class PrefillState(NamedTuple):
    """The prompt that is being prefilled."""

    cache: Cache
    visual: Float[Array, "rows D"]
    """The embeddings of the prompt's visual tokens in order, then unused rows for one chunk."""


def make_sampling_params(sampling: Sampling, seed: int, choice: int) -> SamplingParams:
    """Convert sampling parameters to arrays, with a neutral value for each parameter that is None.

    Args:
      sampling: Sampling parameters as plain numbers.
      seed: Seed of the request, from 0 to 2**64 - 1.
      choice: The index of the sequence within its request.
    """

    def array(value: ArrayLike | None, neutral: ArrayLike, dtype: DTypeLike) -> np.ndarray:
        return np.asarray(neutral if value is None else value, dtype)

    return SamplingParams(
        temperature=array(sampling.temperature, 0.0, np.float32),
        top_k=array(sampling.top_k, MAX_TOP_K, np.int32),
        top_p=array(sampling.top_p, 1.0, np.float32),
        repetition_penalty=array(sampling.repetition_penalty, 1.0, np.float32),
        seed=split_seed(seed),
        choice=np.asarray(choice, np.int32),
    )


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
        key = jax.lax.select(number == 0, key, jax.random.fold_in(key, number))
    return key


def sample_tokens(
    logits: Float[Array, "B V"],
    params: SamplingParams,
    seen: Bool[Array, "B V"],
    num_tokens: Int[Array, "B"],
    mode: SamplingMode,
) -> SampledTokens:
    """Sample one token per row, with each row's own sampling parameters and key.

    Args:
      logits: Float32 logits.
      params: Sampling parameters of each row.
      seen: Which tokens the repetition penalty applies to.
      num_tokens: Number of tokens generated so far, which is folded into the key.
      mode: Which sampling steps to run.
    """
    if mode == "greedy":
        tokens = sample(logits, Sampling())
    else:

        def sample_row(logits: Array, row: SamplingParams, seen: Array, step: Array) -> Array:
            options = Sampling(*row[:4]) if mode == "full" else Sampling(row.temperature)
            key = jax.random.fold_in(make_key(row.seed, row.choice), step)
            return sample(logits[None], options, seen[None], key)[0]

        tokens = jax.vmap(sample_row)(logits, params, seen, num_tokens)
    all_logprobs = jax.nn.log_softmax(logits)
    logprobs = jnp.take_along_axis(all_logprobs, tokens[:, None], axis=1)[:, 0]
    top = None
    if mode == "full":
        values, ids = jax.lax.top_k(all_logprobs, min(MAX_TOP_LOGPROBS, logits.shape[1]))
        top = ids, values
    return SampledTokens(tokens, logprobs, top)


def encode_images(
    model: Ovis,
    params: Params,
    visual: Float[Array, "rows D"],
    pixels: Float[Array, "I h w C"],
    row: Int[ArrayLike, ""],
    seed: UInt32[Array, "2"],
) -> Float[Array, "rows D"]:
    """Write the visual embeddings of crops into `visual`, starting at `row`."""
    # The key is only used by models that sample their visual words.
    key = jax.random.fold_in(derive_image_key(make_key(seed, 0)), row)
    embeddings = model.embed_images(params, pixels, key).reshape(-1, visual.shape[1])
    return jax.lax.dynamic_update_slice(visual, embeddings.astype(visual.dtype), (row, 0))


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
    T, D = tokens.shape[1], state.visual.shape[1]
    visual = jax.lax.dynamic_slice(state.visual, (row, 0), (T, D))
    logits, cache = model.extend(params, tokens, positions, visual[None], state.cache)
    return PrefillState(cache, state.visual), logits


def insert_and_sample(
    state: DecodeState,
    slot: Int[ArrayLike, ""],
    cache: Cache,
    logits: Float[Array, "1 V"],
    sampling_params: SamplingParams,
) -> tuple[DecodeState, SampledTokens]:
    """Start a sequence in a slot, and sample its first token.

    Args:
      state: The state of all slots.
      slot: Index of the slot.
      cache: Cache of the prompt, with a single row.
      logits: Logits at the prompt's last position.
      sampling_params: Sampling parameters of the sequence.
    """
    params = jax.tree.map(lambda x: jnp.asarray(x)[None], sampling_params)
    unseen = jnp.zeros(logits.shape, bool)
    sampled = sample_tokens(logits, params, unseen, jnp.zeros((1,), jnp.int32), "full")
    seen = unseen.at[0, sampled.tokens[0]].set(True)
    row = DecodeState(cache, sampled.tokens, jnp.ones((1,), jnp.int32), seen, params)

    def put(rows: Array, row: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(rows, row.astype(rows.dtype), slot, 0)

    return jax.tree.map(put, state, row), sampled


def decode(
    model: Ovis,
    mode: SamplingMode,
    params: Params,
    state: DecodeState,
    active: Bool[Array, "B"],
) -> tuple[DecodeState, SampledTokens]:
    """Generate one token in every active slot; the other slots do not advance."""
    lengths = state.cache.lengths
    logits, cache = model.decode(params, state.last_tokens, state.cache)
    cache = cache._replace(lengths=jnp.where(active, cache.lengths, lengths))
    sampled = sample_tokens(logits, state.params, state.seen, state.num_tokens, mode)
    seen = state.seen
    if mode == "full":
        seen = seen.at[jnp.arange(len(lengths)), sampled.tokens].set(True)
    num_tokens = state.num_tokens + active
    return DecodeState(cache, sampled.tokens, num_tokens, seen, state.params), sampled


def init_decode_state(
    config: DecoderConfig, num_slots: int, max_length: int, dtype: DTypeLike
) -> DecodeState:
    """Return a state with empty slots for sequences of up to `max_length` positions."""
    params = make_sampling_params(Sampling(), 0, 0)
    return DecodeState(
        kv_cache.empty_cache(config, num_slots, max_length, dtype),
        jnp.zeros((num_slots,), jnp.int32),
        jnp.zeros((num_slots,), jnp.int32),
        jnp.zeros((num_slots, config.vocab_size), bool),
        jax.tree.map(lambda x: jnp.broadcast_to(x, (num_slots, *x.shape)), params),
    )


def init_prefill_state(
    config: DecoderConfig, num_visual_tokens: int, max_length: int, dtype: DTypeLike
) -> PrefillState:
    """Return an empty state for a prompt of up to `max_length` positions and its visual tokens."""
    cache = kv_cache.empty_cache(config, 1, max_length, dtype)
    return PrefillState(cache, jnp.zeros((num_visual_tokens, config.width), dtype))
