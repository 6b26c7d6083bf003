"""The compiled programs of the engine.

The number of programs and the number of slots are fixed. All prompt lengths, numbers of crops and
sampling parameters use the same programs, so they cause no recompilation.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast, get_args

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Float32, Int32, UInt32

from ovis_jax.config import VisionConfig
from ovis_jax.engine.state import (
    MAX_EOS_IDS,
    DecodeState,
    PrefillState,
    SampledTokens,
    SamplingMode,
    SamplingParams,
    add_visual_embeddings,
    decode,
    encode_image,
    init_decode_state,
    init_prefill_state,
    insert_and_sample,
    make_sampling_params,
    prefill_chunk,
    reuse_cache,
    split_seed,
)
from ovis_jax.errors import OvisError
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.image_processing import IMAGE_SLOT
from ovis_jax.model.kv_cache import Cache, num_slots
from ovis_jax.model.ovis import Ovis, Params, activation_dtype
from ovis_jax.sharding import mesh_axis


class ModelRunner:
    """Runs the programs of one model, which the constructor compiles.

    Every method that takes a state donates it and returns the new one. Methods return before the
    device has computed their results; `jax.device_get` waits for them. On a mesh, the caches are
    sharded over the key/value heads, like the parameters; all other state is replicated.

    Args:
      model: The model.
      params: Parameters of the model, on any device or mesh of this process.
      max_num_seqs: Number of slots, which is the maximum number of concurrent sequences.
      max_model_len: Maximum total length of a prompt and its answer, in positions.
      chunk_size: Number of prompt positions per prefill step.
      supports_constraints: Whether to compile the programs for requests with a constraint, too.

    Attributes:
      tokens_per_crop: Number of visual tokens of a crop, M.
      crop_cost: The time that a crop takes, as the number of prompt positions that are prefilled in
        the same time.
      positions_per_decode_step: The time of a decode step, in the same unit.
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
        supports_constraints: bool = True,
    ):
        num_eos_ids = len(model.config.eos_ids)
        if num_eos_ids > MAX_EOS_IDS:
            raise OvisError(
                f"eos_token_id: {num_eos_ids} ids, but the engine supports at most {MAX_EOS_IDS}"
            )
        self._params = params
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self.chunk_size = min(chunk_size, max_model_len)
        self.tokens_per_crop = model.config.visual_tokenizer.tokens_per_crop
        self.ring_slots = min(
            num_slots(model.config.decoder, block, max_model_len, model.kv_cache_dtype)
            for block in range(model.config.decoder.depth)
        )
        self._mask_length = -(-model.config.decoder.vocab_size // 32)
        dtype = activation_dtype(params)
        max_crops = self.max_model_len // self.tokens_per_crop
        visual_rows = max_crops * self.tokens_per_crop + self.chunk_size
        replicated, sharded_cache = _shardings(params, model.config.decoder.num_kv_heads)
        decode_sharding = DecodeState(sharded_cache, *[replicated] * 4)
        prefill_sharding = PrefillState(sharded_cache, replicated)
        self.init_decode_state: Callable[[], DecodeState] = jax.jit(
            partial(init_decode_state, model, max_num_seqs, max_model_len, dtype),
            out_shardings=decode_sharding,
        )
        self.init_prefill_state: Callable[[], PrefillState] = jax.jit(
            partial(init_prefill_state, model, visual_rows, max_model_len, dtype),
            out_shardings=prefill_sharding,
        )
        # Explicitly, so that the engine also runs where implicit transfers are disallowed.
        self._put_on_device = partial(jax.device_put, device=replicated)
        self._encode_image = _compile_once(partial(encode_image, model), None, replicated)
        self._add_visual_embeddings = _compile_once(add_visual_embeddings, 0, prefill_sharding)
        self._reuse_cache = _compile_once(reuse_cache, 0, prefill_sharding)
        self._prefill_chunk = _compile_once(
            partial(prefill_chunk, model), 1, (prefill_sharding, replicated)
        )
        out_shardings = decode_sharding, replicated
        self._insert = _compile_once(insert_and_sample, 0, out_shardings)
        self._decode = {
            mode: _compile_once(partial(decode, model, mode), 1, out_shardings)
            for mode in get_args(SamplingMode)
        }
        self._decode_masked = {
            mode: _compile_once(partial(decode, model, mode), 1, out_shardings)
            for mode in get_args(SamplingMode)
            if mode != "greedy"  # "temperature" samples the same tokens
        }
        self._warm_up(model.config.vision, supports_constraints)

    def _warm_up(self, vision: VisionConfig, supports_constraints: bool) -> None:
        """Run every program once to compile it, then measure those that a budget depends on."""
        pixels = np.zeros((vision.image_size, vision.image_size, vision.num_channels), np.float32)
        embeddings = self.run_encoder(pixels, 0, 0)
        prefill = self.run_add_visual(self.init_prefill_state(), embeddings, 0)
        tokens = np.zeros(1, np.int32)
        prefill, logits = self.run_prefill(prefill, tokens, 0)
        params = make_sampling_params(Sampling(), 0, 0)
        state, _ = self.run_insert(self.init_decode_state(), 0, prefill, logits, params)
        prefill = self.run_reuse(prefill, state, 0)
        inactive = np.zeros(self.max_num_seqs, bool)
        for mode in get_args(SamplingMode):
            for masks in (None, self.allow_all()) if supports_constraints else (None,):
                state, _ = self.run_decode(state, inactive, mode, masks)
        jax.block_until_ready((prefill, state))
        seconds_per_position = _seconds(self.run_prefill, prefill, tokens, 0) / self.chunk_size
        crop_seconds = _seconds(self.run_encoder, pixels, 0, 0)
        step_seconds = _seconds(self.run_decode, state, inactive, "greedy")
        self.crop_cost = math.ceil(crop_seconds / seconds_per_position)
        self.positions_per_decode_step = math.ceil(step_seconds / seconds_per_position)

    def allow_all(self) -> UInt32[np.ndarray, "B n"]:
        """Return masks for `run_decode` that allow every token in every slot."""
        return np.full((self.max_num_seqs, self._mask_length), 2**32 - 1, np.uint32)

    def run_encoder(
        self, pixels: Float32[np.ndarray, "h w C"], crop: int, seed: int
    ) -> Float[Array, "M D"]:
        """Compute the visual embeddings of the prompt's crop with the index `crop`."""
        row = np.int32(crop * self.tokens_per_crop)
        arrays = self._put_on_device((pixels, row, split_seed(seed)))
        return self._encode_image(self._params, *arrays)

    def run_add_visual(
        self, state: PrefillState, embeddings: Float[Array, "M D"], crop: int
    ) -> PrefillState:
        """Add the visual embeddings of the prompt's crop with the index `crop`."""
        row = self._put_on_device(np.int32(crop * self.tokens_per_crop))
        return self._add_visual_embeddings(state, embeddings, row)

    def run_reuse(self, state: PrefillState, decode_state: DecodeState, slot: int) -> PrefillState:
        """Start a prompt with a copy of the cache of a slot; `decode_state` is not donated."""
        row = self._put_on_device(np.int32(slot))
        return self._reuse_cache(state, decode_state.cache, row)

    def run_prefill(
        self, state: PrefillState, tokens: Int32[np.ndarray, "T"], start: int
    ) -> tuple[PrefillState, Float[Array, "1 V"]]:
        """Prefill the chunk of a prompt that begins at position `start`.

        Args:
          state: The state after the previous chunk, with the visual embeddings of all crops.
          tokens: Token ids of the whole prompt.
          start: Number of positions that are already in the cache.

        Returns:
          The new state, and the logits at the chunk's last position.
        """
        ids = np.zeros((1, self.chunk_size), np.int32)
        positions = np.full_like(ids, -1)
        chunk = tokens[start : start + self.chunk_size]
        ids[0, : len(chunk)] = chunk
        positions[0, : len(chunk)] = np.arange(start, start + len(chunk))
        row = np.int32(np.count_nonzero(tokens[:start] == IMAGE_SLOT))
        arrays = self._put_on_device((ids, positions, row))
        return self._prefill_chunk(self._params, state, *arrays)

    def run_insert(
        self,
        state: DecodeState,
        slot: int,
        prefill: PrefillState,
        logits: Float[Array, "1 V"],
        sampling_params: SamplingParams,
        mask: UInt32[np.ndarray, "n"] | None = None,
    ) -> tuple[DecodeState, SampledTokens]:
        """Start a sequence in a slot; `prefill` is not donated.

        Args:
          state: The state of all slots.
          slot: Index of the slot.
          prefill: The state after the prompt's last chunk.
          logits: The logits at the prompt's last position.
          sampling_params: Sampling parameters of the sequence.
          mask: The tokens that the sequence's constraint allows; None if it has none.
        """
        mask = self.allow_all()[0] if mask is None else mask
        row, params, mask = self._put_on_device((np.int32(slot), sampling_params, mask))
        return self._insert(state, row, prefill.cache, logits, params, mask)

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


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


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


def _shardings(params: Params, num_kv_heads: int) -> tuple[Any, Any]:
    """Return the shardings of replicated arrays and of a cache; both are None without a mesh."""
    sharding = params["decoder"]["final_norm"].sharding
    if not isinstance(sharding, NamedSharding):
        return None, None
    replicated = NamedSharding(sharding.mesh, P())
    heads = NamedSharding(sharding.mesh, P(None, mesh_axis("K", num_kv_heads, sharding.mesh)))
    return replicated, Cache(cast(Any, heads), cast(Any, replicated))
