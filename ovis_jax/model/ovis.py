"""The whole model: images and token ids -> logits, with or without a cache."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Key

from ovis_jax.config import OvisConfig
from ovis_jax.errors import RequestError
from ovis_jax.inputs.batch import Inputs
from ovis_jax.inputs.image import IMAGE_SLOT, IMAGE_START
from ovis_jax.mesh_axes import under_any_mesh
from ovis_jax.model.decoder import Decoder
from ovis_jax.model.kernels import Setting
from ovis_jax.model.kv_cache import Cache
from ovis_jax.model.layers import table_rows
from ovis_jax.model.states import ImageStates, States
from ovis_jax.model.vision import VisionEncoder
from ovis_jax.model.visual_tokenizer import (
    VisualTokenizer,
    VisualTokens,
    embed_words,
    merge_patches,
)

Params = dict[str, Any]
"""Nested dict of arrays; `ovis_jax.sharding.PARAM_AXES` lists the paths."""

VISUAL_TOKENS_AT_ONCE = 512
"""Visual tokens whose distributions `scan_words` holds at a time.

In float32 one over 65536 words takes 256 KiB, several times over. So many rows are enough for the
visual head and the table to be worth reading once more.
"""


def apply(module: nn.Module, params: Params, *arguments: Any) -> Any:
    """Call a linen module as a function of its parameters."""
    return module.apply({"params": params}, *arguments)


@dataclass(frozen=True)
class Ovis:
    """The model as pure functions of (params, arrays). It holds no array.

    With `remat`, which is for training, each block's gradient computes the block again instead of
    keeping what was inside it. `attention` is the kernel that reads prompts and crops, or the
    platform to choose for; `ovis_jax.model.kernels.attention_report` says what is chosen.
    """

    config: OvisConfig
    remat: bool = False
    attention: Setting = "auto"

    def init(self, key: Key[Array, ""], dtype: DTypeLike = jnp.float32) -> Params:
        """Random parameters, such as `jax.eval_shape` can take the shapes from."""
        c = self.config
        vision = VisionEncoder(c.vision, dtype)
        visual_tokenizer = VisualTokenizer(c.visual_tokenizer, dtype)
        decoder = Decoder(c.decoder, dtype)
        keys = jax.random.split(key, 4)
        side, D = c.vision.image_size, c.decoder.width
        pixels = jnp.zeros((1, side, side, c.vision.num_channels))
        merged = jnp.zeros((1, 1, c.visual_tokenizer.merged_width), dtype)
        embeds, positions = jnp.zeros((1, 1, D), dtype), jnp.zeros((1, 1), jnp.int32)
        table = jax.random.normal(keys[3], (c.visual_tokenizer.vocab_size, D), dtype)
        return {
            "vision": vision.init(keys[0], pixels)["params"],
            "visual_tokenizer": visual_tokenizer.init(keys[1], merged)["params"],
            "visual_embedding": table * jnp.asarray(D**-0.5, dtype),
            "decoder": decoder.init(keys[2], embeds, positions)["params"],
        }

    def embed_images(
        self,
        params: Params,
        pixels: Float[Array, "I h w C"],
        key: Key[Array, ""] | None = None,
    ) -> ImageStates:
        """Turn crops into visual embeddings.

        Args:
          params: of the whole model, padded for a mesh or not.
          pixels: normalised crops.
          key: for a checkpoint whose `tokenize_function` is gumbel_argmax; see `tokenize`.

        Returns:
          The states, with the true words alone. Cutting the padding off costs nothing where logits
          and probabilities are not read; where they are, it gathers them from a mesh.
        """
        c = self.config
        vision, merged = self._see(params, pixels)
        tokenizer = VisualTokenizer(c.visual_tokenizer)
        tokens = apply(tokenizer, params["visual_tokenizer"], merged, key)
        embeddings = embed_words(tokens.probabilities, params["visual_embedding"])
        words = c.visual_tokenizer.num_words
        logits, probabilities = (x[..., :words] for x in (tokens.logits, tokens.probabilities))
        tokens = VisualTokens(tokens.features, logits, probabilities)
        return ImageStates(vision, tokens, embeddings)

    def embed_crops(
        self,
        params: Params,
        pixels: Float[Array, "I h w C"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "I M D"]:
        """The visual embeddings of `embed_images` alone, in bounded memory.

        Under gumbel_argmax each part of the tokens draws with a key of its own.
        """

        def embed(carry: None, tokens: VisualTokens) -> tuple[None, Float[Array, "I m D"]]:
            return carry, embed_words(tokens.probabilities, params["visual_embedding"])

        return self.scan_words(params, pixels, embed, None, key)[1]

    def scan_words(
        self,
        params: Params,
        pixels: Float[Array, "I h w C"],
        look: Callable[[Any, VisualTokens], tuple[Any, Any]],
        carry: Any,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Any, Any]:
        """Look at all visual tokens, at no more of their distributions at a time than memory holds.

        A part of every crop's tokens is looked at together, so that crops that are spread over
        devices stay where they are. The parts divide the tokens: none is padded.

        Args:
          params: of the whole model, padded for a mesh or not.
          pixels: normalised crops.
          look: called with what is carried on and the m tokens of a part of each crop, with the
            columns of padding that a head on a mesh has; gives what is carried on, and arrays
            [I, m, ...].
          carry: what the first part gets.
          key: see `embed_images`.

        Returns:
          What was carried on to the end, and the arrays joined to [I, M, ...].
        """
        tokenizer = VisualTokenizer(self.config.visual_tokenizer)
        _, merged = self._see(params, pixels)
        crops, M, width = merged.shape
        enough = -(crops * M // -VISUAL_TOKENS_AT_ONCE)
        parts = next(n for n in range(min(enough, M), M + 1) if M % n == 0)

        def one(carry: Any, part: tuple[Array, Array]) -> tuple[Any, Any]:
            number, x = part
            part_key = key if key is None or parts == 1 else jax.random.fold_in(key, number)
            return look(carry, apply(tokenizer, params["visual_tokenizer"], x, part_key))

        x = merged.reshape(crops, parts, M // parts, width).swapaxes(0, 1)
        carry, out = jax.lax.scan(one, carry, (jnp.arange(parts), x))  # [parts, I, m, ...]
        return carry, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(crops, M, *x.shape[3:]), out)

    def _see(
        self, params: Params, pixels: Float[Array, "I h w C"]
    ) -> tuple[tuple[Float[Array, "I P E"], ...], Float[Array, "I M merged"]]:
        """The states of the vision encoder, and the merged patches of the last."""
        c = self.config
        encoder = VisionEncoder(c.vision, remat=self.remat, attention=self.attention)
        vision = apply(encoder, params["vision"], pixels)
        return vision, merge_patches(vision[-1], c.visual_tokenizer.hidden_stride)

    def embed_inputs(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        visual: Float[Array, "I M D"] | None,
    ) -> Float[Array, "B T D"]:
        """One sequence of embeddings from text ids, indicator ids and visual slots.

        Slots take the visual embeddings in order of appearance over the batch.
        """
        text, table = params["decoder"]["embed"], params["visual_embedding"]
        x = text[jnp.maximum(tokens, 0)]  # [B, T, D]
        # -301 .. -305 are the last five rows of the table before any padding, in that order.
        row = self.config.visual_tokenizer.num_words + (IMAGE_START - tokens)
        x = jnp.where((tokens <= IMAGE_START)[..., None], table[jnp.maximum(row, 0)], x)
        if visual is None:
            return x
        slots = tokens == IMAGE_SLOT
        order = jnp.cumsum(slots.reshape(-1)).reshape(slots.shape) - 1  # [B, T]
        visual = visual.reshape(-1, visual.shape[-1])  # [I M, D]
        return jnp.where(slots[..., None], visual[jnp.maximum(order, 0)], x)

    def forward(
        self, params: Params, inputs: Inputs, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "B T V"], States]:
        """Float32 logits at every position, without a cache, and the states on the way there."""
        pixels = jnp.asarray(inputs.pixels)
        images = self.embed_images(params, pixels, key) if len(pixels) else None
        visual = None if images is None else images.embeddings
        x = self.embed_inputs(params, jnp.asarray(inputs.tokens), visual)
        positions = jnp.asarray(inputs.positions)
        decoder = Decoder(self.config.decoder, remat=self.remat, attention=self.attention)
        out = apply(decoder, params["decoder"], x, positions)
        return out.logits, States(images, x, out.hidden_states)

    def prefill(
        self,
        params: Params,
        inputs: Inputs,
        max_length: int,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Read whole prompts.

        Args:
          params: of the whole model.
          inputs: the prompts.
          max_length: positions a row may reach in all; the cache has room for so many.
          key: see `embed_images`.

        Returns:
          Float32 logits of each row's last position, and the cache.

        Raises:
          RequestError: the prompts alone are longer than `max_length`.
        """
        B, T = inputs.tokens.shape
        if T > max_length:
            raise RequestError(
                f"the cache is too short: max_length is {max_length}, the prompts take {T}"
            )
        positions = jnp.asarray(inputs.positions)
        pixels = jnp.asarray(inputs.pixels)
        visual = self.embed_crops(params, pixels, key) if len(pixels) else None
        x = self.embed_inputs(params, jnp.asarray(inputs.tokens), visual)
        columns = jnp.argmax(positions, axis=1)
        decoder = Decoder(self.config.decoder, attention=self.attention)
        out = apply(decoder, params["decoder"], x, positions, None, columns, max_length)
        return out.logits[:, 0], Cache(out.key_values, jnp.max(positions, axis=1) + 1)

    def extend(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        visual: Float[Array, "I M D"] | None,
        cache: Cache,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Read more of prompts whose beginning the cache holds.

        Args:
          params: of the whole model.
          tokens: as in `Inputs`.
          positions: those that follow `cache.lengths`, at least one a row; -1 at padding on the
            right.
          visual: what the visual slots among `tokens` take, in order of appearance.
          cache: what was read before; `kv_cache.empty` for nothing. It has to have room.

        Returns:
          Float32 logits of each row's last position, and the new cache.
        """
        x = self.embed_inputs(params, tokens, visual)
        columns = jnp.argmax(positions, axis=1)
        decoder = Decoder(self.config.decoder)
        out = apply(decoder, params["decoder"], x, positions, cache, columns)
        return out.logits[:, 0], Cache(out.key_values, jnp.max(positions, axis=1) + 1)

    def decode(
        self, params: Params, tokens: Int[Array, "B"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Read one more text token a row; float32 logits of what follows, and the new cache."""
        x = table_rows(params["decoder"]["embed"], tokens)[:, None]  # [B, 1, D]
        positions = cache.lengths[:, None]  # [B, 1]
        out = apply(Decoder(self.config.decoder), params["decoder"], x, positions, cache)
        return out.logits[:, 0], Cache(out.key_values, cache.lengths + 1)


@partial(jax.jit, static_argnames=("model", "return_states"))
@under_any_mesh
def forward(
    model: Ovis, params: Params, inputs: Inputs, *, return_states: bool = False
) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], States]:
    """Float32 logits at every position; with `return_states`, also the states on the way there."""
    logits, states = model.forward(params, inputs)
    return (logits, states) if return_states else logits
