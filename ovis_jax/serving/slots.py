"""What is done on the device for answers that are written together, as pure functions.

Each answer has a slot, a row of one state. A prompt is read in pieces of one shape into a cache of
its own, whose row then joins the slots. `steps.py` compiles all of it.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Key

from ovis_jax.config import DecoderConfig
from ovis_jax.inference.sampling import MOST, Sampling, images_key, pick
from ovis_jax.model import kv_cache
from ovis_jax.model.kv_cache import Cache
from ovis_jax.model.ovis import Ovis, Params

How = Literal["greedy", "drawn", "all"]
"""How a step picks tokens: the likeliest; at a temperature; with every sampling step and the
likeliest other tokens. Each is a program. A row's token is the same in each that can serve it."""

TOP = 20
"""The likeliest tokens that are told of each one picked, the most that the API has."""


class Picked(NamedTuple):
    """The tokens of one step."""

    tokens: Int[Array, "B"]
    log_probs: Float[Array, "B"]
    """Under the model, before any sampling step."""
    top: tuple[Int[Array, "B n"], Float[Array, "B n"]] | None
    """The likeliest tokens and their log-probabilities; None where nobody asks."""


class Slots(NamedTuple):
    """The state of all requests that are being answered, a row each."""

    cache: Cache
    last: Int[Array, "B"]
    steps: Int[Array, "B"]
    """How many tokens a row has been given."""
    keys: Key[Array, "B"]
    seen: Bool[Array, "B V"]
    """What a row has been given; kept only where a penalty is in use."""
    sampling: Sampling


class Asked(NamedTuple):
    """How one answer is to be written: numbers, and so nothing to compile."""

    sampling: Sampling
    seed: Int[ArrayLike, "2"]
    """The low and the high half of a seed of 64 bits, uint32."""
    choice: ArrayLike
    """0 for a request's first answer, 1 for its second; each draws with a key of its own."""


class Reading(NamedTuple):
    """A prompt that is being read."""

    cache: Cache
    visual: Float[Array, "rows D"]
    """The embeddings of its visual slots in order, with room behind them for one piece."""


def asked(sampling: Sampling, seed: int, choice: int) -> Asked:
    """The numbers of one answer."""
    neutral = (
        (sampling.temperature, 0.0, np.float32),
        (sampling.top_k, MOST, np.int32),
        (sampling.top_p, 1.0, np.float32),
        (sampling.repetition_penalty, 1.0, np.float32),
    )
    values = [np.asarray(other if x is None else x, dtype) for x, other, dtype in neutral]
    halves = np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint32)
    return Asked(Sampling(*values), halves, np.int32(choice))


def make_key(seed: Int[Array, "2"], choice: ArrayLike) -> Key[Array, ""]:
    """The key of an answer; for the first one of a seed below 2**32 it is `jax.random.key(seed)`.

    So what is drawn is what `generate` draws with that key.
    """
    key = jax.random.key(seed[0])
    for number in (seed[1], choice):
        key = jax.lax.select(jnp.asarray(number) == 0, key, jax.random.fold_in(key, number))
    return key


def choose(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    seen: Bool[Array, "B V"],
    keys: Key[Array, "B"],
    steps: Int[Array, "B"],
    how: How,
) -> Picked:
    """Pick a token a row, by its own numbers and its own key folded by its own step."""
    if how == "greedy":
        tokens = pick(logits, Sampling())
    else:
        used = sampling if how == "all" else Sampling(sampling.temperature)

        def one(logits: Array, used: Sampling, seen: Array, key: Array, step: Array) -> Array:
            return pick(logits[None], used, seen[None], jax.random.fold_in(key, step))[0]

        tokens = jax.vmap(one)(logits, used, seen, keys, steps)
    every = jax.nn.log_softmax(logits)
    log_probs = jnp.take_along_axis(every, tokens[:, None], axis=1)[:, 0]
    top = None
    if how == "all":
        values, ids = jax.lax.top_k(every, min(TOP, every.shape[1]))
        top = ids, values
    return Picked(tokens, log_probs, top)


def see(
    model: Ovis, params: Params, visual: Array, pixels: Array, row: ArrayLike, seed: Array
) -> Array:
    """Embed a crop float32 [h, w, C], from `row` of `visual` on, which is given away."""
    # For a model that draws its visual words.
    key = jax.random.fold_in(images_key(make_key(seed, 0)), row)
    found = model.embed_crops(params, pixels[None], key)[0]
    return jax.lax.dynamic_update_slice(visual, found.astype(visual.dtype), (row, 0))


def read(
    model: Ovis,
    params: Params,
    reading: Reading,
    tokens: Int[Array, "1 T"],
    positions: Int[Array, "1 T"],
    row: ArrayLike,
) -> tuple[Reading, Float[Array, "1 V"]]:
    """Read one piece of a prompt, whose visual slots are those from `row` on."""
    T, D = tokens.shape[1], reading.visual.shape[1]
    visual = jax.lax.dynamic_slice(reading.visual, (row, 0), (T, D))
    logits, cache = model.extend(params, tokens, positions, visual[None], reading.cache)
    return Reading(cache, reading.visual), logits


def join(
    slots: Slots, slot: ArrayLike, cache: Cache, logits: Float[Array, "1 V"], asked: Asked
) -> tuple[Slots, Picked]:
    """Put a prompt that was read into a slot, and pick the first token of its answer."""

    def put(rows: Array, row: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(rows, row[None].astype(rows.dtype), slot, 0)

    key = make_key(jnp.asarray(asked.seed), asked.choice)
    unseen = jnp.zeros(logits.shape, bool)
    sampling = jax.tree.map(lambda x: jnp.reshape(x, (1,)), asked.sampling)
    picked = choose(logits, sampling, unseen, key[None], jnp.zeros((1,), jnp.int32), "all")
    token = picked.tokens[0]
    joined = Slots(
        jax.tree.map(lambda rows, row: put(rows, row[0]), slots.cache, cache),
        put(slots.last, token),
        put(slots.steps, jnp.int32(1)),
        slots.keys.at[slot].set(key),
        put(slots.seen, unseen[0].at[token].set(True)),
        jax.tree.map(put, slots.sampling, jax.tree.map(jnp.asarray, asked.sampling)),
    )
    return joined, picked


def write(
    model: Ovis, how: How, params: Params, slots: Slots, active: Bool[Array, "B"]
) -> tuple[Slots, Picked]:
    """Write one token in every slot; those that are not active stay where they are."""
    lengths = slots.cache.lengths
    logits, cache = model.decode(params, slots.last, slots.cache)
    cache = cache._replace(lengths=jnp.where(active, cache.lengths, lengths))
    picked = choose(logits, slots.sampling, slots.seen, slots.keys, slots.steps, how)
    seen = slots.seen
    if how == "all":
        seen = seen.at[jnp.arange(len(lengths)), picked.tokens].set(True)
    steps = slots.steps + active
    return Slots(cache, picked.tokens, steps, slots.keys, seen, slots.sampling), picked


def empty_slots(config: DecoderConfig, rows: int, max_length: int, dtype: Any) -> Slots:
    """Slots that nobody has used."""
    one = asked(Sampling(), 0, 0)
    return Slots(
        kv_cache.empty(config, rows, max_length, dtype),
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows,), jnp.int32),
        jnp.broadcast_to(make_key(jnp.asarray(one.seed), 0), (rows,)),
        jnp.zeros((rows, config.vocab_size), bool),
        jax.tree.map(lambda x: jnp.full((rows,), x), one.sampling),
    )


def empty_reading(config: DecoderConfig, rows: int, max_length: int, dtype: Any) -> Reading:
    """Room to read prompts with as many visual slots, one after the other."""
    cache = kv_cache.empty(config, 1, max_length, dtype)
    return Reading(cache, jnp.zeros((rows, config.width), dtype))
