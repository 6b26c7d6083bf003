"""The compiled programs of the engine.

The number of slots is fixed. The cache has one of a few lengths, and each of them has programs of
its own. All prompt lengths, numbers of crops and sampling parameters use the same programs, so they
cause no recompilation.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Float32, Int32, UInt32

from ovis_jax.config import VisionConfig
from ovis_jax.engine.state import (
    MAX_EOS_IDS,
    DecodeState,
    SampledTokens,
    SamplingMode,
    SamplingParams,
    add_visual_embeddings,
    copy_cache,
    decode,
    encode_crops,
    init_decode_state,
    init_visual,
    make_sampling_params,
    prefill_chunks,
    split_seed,
    start_sequences,
)
from ovis_jax.errors import OvisError
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.image_processing import IMAGE_SLOT
from ovis_jax.model import kv_cache
from ovis_jax.model.kv_cache import Cache, CacheBlock
from ovis_jax.model.ovis import Ovis, Params, activation_dtype
from ovis_jax.sharding import mesh_axis

NUM_CACHE_LENGTHS = 4
"""Maximum number of lengths of the cache; each is about twice as long as the one before."""

CACHE_LENGTH_STEP = 128
"""Lengths of the cache, except for the maximum length, are multiples of this many positions."""

_T = TypeVar("_T")


class Crop(NamedTuple):
    """A crop whose visual embeddings are computed."""

    pixels: Float32[np.ndarray, "h w C"]
    lane: int
    """The lane of its prompt."""
    index: int
    """The index of the crop in its prompt."""
    seed: int
    """The seed of its prompt."""


class Chunk(NamedTuple):
    """The next positions of a prompt."""

    tokens: Int32[np.ndarray, "T"]
    """Token ids of the whole prompt."""
    start: int
    """Number of positions that are already in the cache."""
    slot: int
    lane: int


class Start(NamedTuple):
    """A sequence that starts after its prompt."""

    slot: int
    row: int
    """The row of the prompt's logits."""
    params: SamplingParams
    mask: UInt32[np.ndarray, "words"] | None
    """The tokens that the sequence's constraint allows; None if it has none."""


class ModelRunner:
    """Runs the programs of one model, which the constructor compiles.

    Every method that takes a state or the lanes of visual embeddings donates them and returns the
    new ones. A state has a cache of one of the `cache_lengths`. Methods return before the device
    has computed their results; `jax.device_get` waits for them. On a mesh, the caches are sharded
    over the key/value heads, like the parameters; all other state is replicated. The programs for
    crops, chunks and starts take one of them or `max_num_partial_prefills` of them; the last one is
    repeated to fill a program.

    Args:
      model: The model.
      params: Parameters of the model, on any device or mesh of this process.
      max_num_seqs: Number of slots, which is the maximum number of concurrent sequences.
      max_model_len: Maximum total length of a prompt and its answer, in positions.
      chunk_size: Number of prompt positions per prefill step.
      max_num_partial_prefills: Maximum number of prompts that are prefilled at a time.
      supports_constraints: Whether to compile the programs for requests with a constraint, too.

    Attributes:
      cache_lengths: The lengths of the cache, in positions, in ascending order; the last one is
        `max_model_len`.
      tokens_per_crop: Number of visual tokens of a crop, M.
      crop_cost: The time that a crop takes, as the number of prompt positions that are prefilled in
        the same time.
      decode_seconds: The time of a decode step, in seconds.
      positions_per_decode_step: The time of a decode step, as a number of prompt positions.
      ring_slots: Number of slots of the smallest cache of a block, at most `max_model_len`.

    Raises:
      OvisError: The checkpoint has more than `MAX_EOS_IDS` stop ids.
    """

    def __init__(
        self,
        model: Ovis,
        params: Params,
        *,
        max_num_seqs: int,
        max_model_len: int,
        chunk_size: int,
        max_num_partial_prefills: int = 1,
        supports_constraints: bool = True,
    ):
        num_eos_ids = len(model.config.eos_ids)
        if num_eos_ids > MAX_EOS_IDS:
            raise OvisError(
                f"eos_token_id: {num_eos_ids} ids, but the engine supports at most {MAX_EOS_IDS}"
            )
        self._params = params
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self.max_num_partial_prefills = min(max_num_partial_prefills, max_num_seqs)
        self.chunk_size = min(chunk_size, max_model_len)
        self.cache_lengths = cache_lengths(max_model_len)
        self.tokens_per_crop = model.config.visual_tokenizer.tokens_per_crop
        self._model = model
        self.ring_slots = min(self._num_slots(max_model_len))
        self._mask_length = -(-model.config.decoder.vocab_size // 32)
        dtype = activation_dtype(params)
        max_crops = self.max_model_len // self.tokens_per_crop
        visual_rows = max(max_crops, 1) * self.tokens_per_crop
        replicated, sharded_cache = state_shardings(params, model.config.decoder.num_kv_heads)
        decode_sharding = DecodeState(sharded_cache, cast(Any, replicated))
        self._init_decode_state = jax.jit(
            partial(init_decode_state, model, max_num_seqs, dtype=dtype),
            static_argnames="max_length",
            out_shardings=decode_sharding,
        )
        self.init_visual: Callable[[], Float[Array, "lanes rows D"]] = jax.jit(
            partial(init_visual, model, self.max_num_partial_prefills, visual_rows, dtype),
            out_shardings=replicated,
        )
        # Explicitly, so that the engine also runs where implicit transfers are disallowed.
        self._put_on_device = partial(jax.device_put, device=replicated)
        self._add_visual_embeddings = _compile_once(add_visual_embeddings, 0, replicated)
        self._resize_rows = jax.jit(
            kv_cache.resize_rows,
            static_argnames="num_slots",
            out_shardings=None if sharded_cache is None else sharded_cache.blocks,
        )
        self._limit_lengths = jax.jit(
            lambda lengths, limit: jnp.minimum(lengths, limit),
            static_argnames="limit",
            out_shardings=replicated,
        )
        states = {
            max(self._num_slots(length)): abstract_state(model, params, max_num_seqs, length)
            for length in reversed(self.cache_lengths)
        }
        with ThreadPoolExecutor(os.cpu_count(), "ovis-compile") as pool:

            def per_length(function: Callable[..., Any], state_argument: int, *results: Any) -> Any:
                shardings = (decode_sharding, *results) if results else decode_sharding
                return _ProgramPerLength(function, state_argument, shardings, states, pool)

            self._copy_cache = per_length(copy_cache, 0)
            sizes = sorted({1, self.max_num_partial_prefills})
            self._encode_crops = {
                n: _compile_once(partial(encode_crops, model), 1, replicated) for n in sizes
            }
            self._prefill_chunks = {
                n: per_length(partial(prefill_chunks, model), 1, replicated) for n in sizes
            }
            self._start_sequences = {
                n: _compile_once(start_sequences, 0, replicated) for n in sizes
            }
            self._decode = {
                mode: per_length(partial(decode, model, mode), 1, replicated)
                for mode in get_args(SamplingMode)
            }
            self._decode_masked = {
                mode: per_length(partial(decode, model, mode), 1, replicated)
                for mode in get_args(SamplingMode)
                if mode != "greedy"  # "temperature" samples the same tokens
            }
            self._warm_up(model.config.vision, supports_constraints)

    def _warm_up(self, vision: VisionConfig, supports_constraints: bool) -> None:
        """Run every program once to compile it, then measure those that a budget depends on.

        The longest cache comes first, so that programs that do not fit the device fail soon.
        """
        pixels = np.zeros((vision.image_size, vision.image_size, vision.num_channels), np.float32)
        crop, chunk = Crop(pixels, 0, 0, 0), Chunk(np.zeros(1, np.int32), 0, 0, 0)
        start = Start(0, 0, make_sampling_params(Sampling(), 0, 0), None)
        state, visual = self.init_decode_state(self.max_model_len), self.init_visual()
        for n in self._encode_crops:
            visual, embeddings = self.run_encoder(visual, [crop] * n)
            visual = self.run_add_visual(visual, embeddings[0], 0, 0)
        inactive = np.zeros(self.max_num_seqs, bool)
        length = self.max_model_len
        for next_length in reversed(self.cache_lengths):
            state = self.resize_cache(state, length, next_length)
            length = next_length
            for n in self._encode_crops:
                state, logits = self.run_prefill(state, visual, [chunk] * n)
                state, _ = self.run_start(state, logits, [start] * n)
            state = self.run_copy(state, 0, 0)
            for mode in get_args(SamplingMode):
                for masks in (None, self.allow_all()) if supports_constraints else (None,):
                    state, _ = self.run_decode(state, inactive, mode, masks)
        state = self.resize_cache(state, length, self.max_model_len)
        state = self.resize_cache(state, self.max_model_len, length)
        jax.block_until_ready((state, visual))
        (state, _), chunk_seconds = _timed(self.run_prefill, state, visual, [chunk])
        (state, _), self.decode_seconds = _timed(self.run_decode, state, inactive, "greedy")
        _, crop_seconds = _timed(self.run_encoder, visual, [crop])
        seconds_per_position = chunk_seconds / self.chunk_size
        self.positions_per_decode_step = math.ceil(self.decode_seconds / seconds_per_position)
        self.crop_cost = math.ceil(crop_seconds / seconds_per_position)

    def _num_slots(self, length: int) -> list[int]:
        """Return the number of slots of each block in a cache of `length` positions."""
        config, dtype = self._model.config.decoder, self._model.kv_cache_dtype
        return [kv_cache.num_slots(config, i, length, dtype) for i in range(config.depth)]

    def init_decode_state(self, cache_length: int) -> DecodeState:
        """Return a state with empty slots and a cache of one of the `cache_lengths`."""
        return self._init_decode_state(max_length=cache_length)

    def resize_cache(self, state: DecodeState, old_length: int, new_length: int) -> DecodeState:
        """Change the length of the cache, through all `cache_lengths` in between.

        The blocks are resized one after the other, so that old and new blocks together need little
        more memory than the larger of the two caches. Slots that are used must have fewer than
        `new_length` positions, unless the cache grows.
        """
        old, new = map(self.cache_lengths.index, (old_length, new_length))
        step = 1 if new > old else -1
        for index in range(old + step, new + step, step):
            state = self._resize_cache(state, self.cache_lengths[index])
        return state

    def _resize_cache(self, state: DecodeState, length: int) -> DecodeState:
        blocks: list[CacheBlock] = []
        for block, num_slots in zip(state.cache.blocks, self._num_slots(length), strict=True):
            if num_slots == kv_cache.length(block):
                blocks.append(block)
                continue
            blocks.append(jax.block_until_ready(self._resize_rows(block, num_slots=num_slots)))
            for rows in jax.tree.leaves(block):
                rows.delete()
        lengths = self._limit_lengths(state.cache.lengths, limit=length - 1)
        return state._replace(cache=Cache(tuple(blocks), lengths))

    def allow_all(self) -> UInt32[np.ndarray, "B n"]:
        """Return masks for `run_decode` that allow every token in every slot."""
        return np.full((self.max_num_seqs, self._mask_length), 2**32 - 1, np.uint32)

    def _fill(self, items: Sequence[_T]) -> list[_T]:
        """Return as many items as a program takes; the last one is repeated."""
        return _repeat_last(items, 1 if len(items) == 1 else self.max_num_partial_prefills)

    def run_encoder(
        self, visual: Float[Array, "lanes rows D"], crops: Sequence[Crop]
    ) -> tuple[Float[Array, "lanes rows D"], tuple[Float[Array, "M D"], ...]]:
        """Compute the visual embeddings of at most `max_num_partial_prefills` crops.

        Returns:
          The new `visual`, which contains them, and the embeddings of each crop.
        """
        pixels, lanes, indices, seeds = zip(*self._fill(crops), strict=True)
        rows = np.array(indices, np.int32) * np.int32(self.tokens_per_crop)
        split = np.stack([split_seed(seed) for seed in seeds])
        arrays = np.stack(pixels), np.array(lanes, np.int32), rows, split
        program = self._encode_crops[len(lanes)]
        visual, embeddings = program(self._params, visual, *self._put_on_device(arrays))
        return visual, embeddings[: len(crops)]

    def run_add_visual(
        self,
        visual: Float[Array, "lanes rows D"],
        embeddings: Float[Array, "M D"],
        lane: int,
        index: int,
    ) -> Float[Array, "lanes rows D"]:
        """Add the visual embeddings of a prompt's crop with the index `index` to a lane."""
        numbers = self._put_on_device((np.int32(lane), np.int32(index * self.tokens_per_crop)))
        return self._add_visual_embeddings(visual, embeddings, *numbers)

    def run_copy(self, state: DecodeState, source: int, target: int) -> DecodeState:
        """Copy the cache of a slot to another slot."""
        return self._copy_cache(state, *self._put_on_device((np.int32(source), np.int32(target))))

    def run_prefill(
        self, state: DecodeState, visual: Float[Array, "lanes rows D"], chunks: Sequence[Chunk]
    ) -> tuple[DecodeState, Float[Array, "n V"]]:
        """Prefill chunks of at most `max_num_partial_prefills` prompts; `visual` is not donated.

        Returns:
          The new state, and the logits at each chunk's last position.
        """
        filled = self._fill(chunks)
        ids = np.zeros((len(filled), self.chunk_size), np.int32)
        positions = np.full_like(ids, -1)
        numbers = np.zeros((3, len(filled)), np.int32)
        for i, (tokens, start, slot, lane) in enumerate(filled):
            chunk = tokens[start : start + self.chunk_size]
            ids[i, : len(chunk)] = chunk
            positions[i, : len(chunk)] = np.arange(start, start + len(chunk))
            numbers[:, i] = slot, lane, np.count_nonzero(tokens[:start] == IMAGE_SLOT)
        arrays = self._put_on_device((ids, positions, *numbers))
        return self._prefill_chunks[len(filled)](self._params, state, visual, *arrays)

    def run_start(
        self, state: DecodeState, logits: Float[Array, "m V"], starts: Sequence[Start]
    ) -> tuple[DecodeState, SampledTokens]:
        """Start at most as many sequences as there are rows of logits, after their prompts."""
        slots, rows, params, masks = zip(*_repeat_last(starts, len(logits)), strict=True)
        all_allowed = self.allow_all()[0]
        arrays = (
            np.array(slots, np.int32),
            np.array(rows, np.int32),
            jax.tree.map(lambda *x: np.stack(x), *params),
            np.stack([all_allowed if mask is None else mask for mask in masks]),
        )
        program = self._start_sequences[len(slots)]
        sequences, sampled = program(state.sequences, logits, *self._put_on_device(arrays))
        return state._replace(sequences=sequences), sampled

    def run_decode(
        self,
        state: DecodeState,
        active: Bool[np.ndarray, "B"],
        mode: SamplingMode,
        masks: UInt32[np.ndarray, "B n"] | None = None,
    ) -> tuple[DecodeState, SampledTokens]:
        """Generate a token in every active slot.

        Args:
          state: The state of all slots.
          active: Which slots are active.
          mode: A mode that supports the sampling parameters of all active slots.
          masks: The tokens that each slot's constraint allows; None if no active slot has one.
        """
        if masks is None:
            return self._decode[mode](self._params, state, self._put_on_device(active))
        program = self._decode_masked["temperature" if mode == "greedy" else mode]
        return program(self._params, state, *self._put_on_device((active, masks)))


def _repeat_last(items: Sequence[_T], size: int) -> list[_T]:
    return [*items, *[items[-1]] * (size - len(items))]


def _timed(function: Callable[..., _T], *arguments: Any) -> tuple[_T, float]:
    """Return the result of a function, and the seconds until the device has computed it."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, time.perf_counter() - start


def cache_lengths(max_model_len: int) -> tuple[int, ...]:
    """Return the lengths of a cache for sequences of up to `max_model_len` positions, ascending."""
    halves = (max_model_len / 2**n for n in range(1, NUM_CACHE_LENGTHS))
    rounded = {CACHE_LENGTH_STEP * math.ceil(half / CACHE_LENGTH_STEP) for half in halves}
    return (*sorted(x for x in rounded if x < max_model_len), max_model_len)


def _compile_once(
    function: Callable[..., Any], donated_argument: int | None, out_shardings: Any
) -> Callable[..., Any]:
    """Return a function that is compiled in its first call and then rejects other shapes."""
    jitted = jax.jit(function, donate_argnums=donated_argument, out_shardings=out_shardings)
    compiled: Any = None

    def call(*arguments: Any) -> Any:
        nonlocal compiled
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return function(*arguments)
        if compiled is None:
            compiled = jitted.lower(*arguments).compile()
        return compiled(*arguments)

    return call


class _ProgramPerLength:
    """A function that is compiled for each length of the cache, and for one shape of the rest.

    The first call begins to compile for all lengths at a time, because compilers use few of a
    machine's cores, and there are many programs.

    Args:
      function: The function.
      state_argument: Index of its argument that is a `DecodeState`, which is donated.
      out_shardings: Shardings of the results, as in `jax.jit`.
      states: Abstract states by the length of their longest block, in the order in which to
        compile.
      pool: The threads that compile.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        state_argument: int,
        out_shardings: Any,
        states: Mapping[int, DecodeState],
        pool: Executor,
    ):
        self._function, self._state_argument = function, state_argument
        self._jitted = jax.jit(function, donate_argnums=state_argument, out_shardings=out_shardings)
        self._states, self._pool = states, pool
        self._programs: dict[int, Future[Callable[..., Any]]] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Call the program for the cache of the state."""
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return self._function(*arguments)
        before, after = arguments[: self._state_argument], arguments[self._state_argument + 1 :]
        if not self._programs:
            for longest, state in self._states.items():
                lowered = self._jitted.lower(*before, state, *after)
                self._programs[longest] = self._pool.submit(lowered.compile)
        blocks = arguments[self._state_argument].cache.blocks
        longest = max(kv_cache.length(block) for block in blocks)
        return self._programs[longest].result()(*arguments)


def abstract_state(model: Ovis, params: Params, num_seqs: int, cache_length: int) -> DecodeState:
    """Return the shapes and, on a mesh, the shardings of a state."""
    state = jax.eval_shape(
        lambda: init_decode_state(model, num_seqs, cache_length, activation_dtype(params))
    )
    replicated, cache = state_shardings(params, model.config.decoder.num_kv_heads)
    if cache is None:
        return state

    def with_sharding(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    blocks = with_sharding(state.cache.blocks, cache.blocks)
    lengths, sequences = with_sharding((state.cache.lengths, state.sequences), replicated)
    return DecodeState(state.cache._replace(blocks=blocks, lengths=lengths), sequences)


def state_shardings(params: Params, num_kv_heads: int) -> tuple[Any, Any]:
    """Return the shardings of replicated arrays and of a cache; both are None without a mesh."""
    sharding = params["decoder"]["final_norm"].sharding
    if not isinstance(sharding, NamedSharding):
        return None, None
    replicated = NamedSharding(sharding.mesh, P())
    heads = NamedSharding(sharding.mesh, P(None, mesh_axis("K", num_kv_heads, sharding.mesh)))
    return replicated, Cache(cast(Any, heads), cast(Any, replicated))
