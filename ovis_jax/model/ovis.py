"""The complete model, from images and token ids to logits, with or without a KV cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Key

from ovis_jax.argument_type_checks import check_argument_types
from ovis_jax.config import OvisConfig
from ovis_jax.errors import RequestError
from ovis_jax.inputs.batch import Inputs
from ovis_jax.inputs.image_processing import IMAGE_SLOT, IMAGE_START
from ovis_jax.mesh import allow_explicit_mesh
from ovis_jax.model.attention_kernels import AttentionKernel, KernelSetting, Platform, choose_kernel
from ovis_jax.model.decoder import Decoder, unembed
from ovis_jax.model.kv_cache import Cache, KVCacheDtype, empty_cache
from ovis_jax.model.linear import Weight, lookup
from ovis_jax.model.vision import VisionEncoder
from ovis_jax.model.visual_tokenizer import (
    VisualTokenizer,
    VisualTokens,
    embed_words,
    merge_patches,
    scan_visual_tokens,
)

Params = dict[str, Any]
"""The parameters as a nested dict of arrays; `ovis_jax.sharding.PARAM_AXES` lists the paths."""


class ImageStates(NamedTuple):
    """The results of each stage from crops to visual embeddings.

    Attributes:
      vision: The patch embeddings, followed by the output of each SigLIP block.
      tokens: The results of each stage in the visual tokenizer.
      embeddings: The visual embeddings.
    """

    vision: tuple[Float[Array, "I P E"], ...]
    tokens: VisualTokens
    embeddings: Float[Array, "I M D"]


class ForwardStates(NamedTuple):
    """The results of each stage in a forward pass.

    Attributes:
      images: The stages from crops to visual embeddings; None for inputs without crops.
      inputs_embeds: Embeddings of text, image indicators and visual tokens in one sequence, before
        scaling by sqrt(D).
      hidden: The output of each decoder block, without the final norm.
    """

    images: ImageStates | None
    inputs_embeds: Float[Array, "B T D"]
    hidden: tuple[Float[Array, "B T D"], ...]


def activation_dtype(params: Mapping[str, Any]) -> jnp.dtype:
    """Return the dtype of the activations: that of the norms, which are never quantized."""
    return params["decoder"]["final_norm"].dtype


def apply(module: nn.Module, params: Params, *arguments: Any) -> Any:
    """Call a Flax linen module as a function of its parameters."""
    return module.apply({"params": params}, *arguments)


@dataclass(frozen=True)
class Ovis:
    """The model. Its methods are pure functions of parameters and arrays; the object has no arrays.

    In all methods, `params` are the parameters of the complete model, with or without the padding
    for a mesh. `key` is a random key, which is only used if the config's `tokenize_function` is
    "gumbel_argmax".

    Attributes:
      config: Config of the model.
      remat: Whether the backward pass recomputes each block instead of storing its activations.
      attention_kernel: Attention kernel for prompts and crops; "auto" chooses one for the platform.
      platform: Platform that the program is compiled for; None for JAX's current platform.
        `ovis_jax.model.attention_kernels.attention_report` lists the kernels that a platform uses.
      kv_cache_dtype: Dtype of the KV cache: "auto" for the dtype of the activations, or "int8",
        which takes half the memory of bfloat16 and rounds keys and values. Methods without a cache
        ignore it.

    Raises:
      RequestError: The kernel, the platform or the dtype of the KV cache is unknown.
    """

    config: OvisConfig
    remat: bool = False
    attention_kernel: AttentionKernel = "auto"
    platform: Platform | None = None
    kv_cache_dtype: KVCacheDtype = "auto"

    def __post_init__(self) -> None:
        # An unknown kernel or platform raises here. A decode step supports every known one.
        choose_kernel(self.attention_kernel, "decode", 1, platform=self.platform)
        if self.kv_cache_dtype not in get_args(KVCacheDtype):
            known = " or ".join(get_args(KVCacheDtype))
            raise RequestError(f"kv_cache_dtype {self.kv_cache_dtype!r}: expected {known}")

    def init(self, key: Key[Array, ""], dtype: DTypeLike = jnp.float32) -> Params:
        """Create random parameters. Under `jax.eval_shape`, this returns only their shapes."""
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

    def encode_vision(
        self, params: Params, pixels: Float[Array, "I h w C"]
    ) -> tuple[Float[Array, "I P E"], ...]:
        """Run the vision encoder on normalized crops; return the outputs of `VisionEncoder`."""
        setting = KernelSetting(self.attention_kernel, self.platform)
        encoder = VisionEncoder(self.config.vision, remat=self.remat, kernel_setting=setting)
        return apply(encoder, params["vision"], pixels)

    def embed_images(
        self, params: Params, pixels: Float[Array, "I h w C"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "I M D"]:
        """Compute the visual embeddings of normalized crops, in chunks to bound the memory.

        With "gumbel_argmax", each chunk samples with its own key.
        """

        def embed(carry: None, tokens: VisualTokens) -> tuple[None, Float[Array, "I m D"]]:
            return carry, embed_words(tokens.probabilities, params["visual_embedding"])

        features = self.encode_vision(params, pixels)[-1]
        config, tokenizer_params = self.config.visual_tokenizer, params["visual_tokenizer"]
        return scan_visual_tokens(config, tokenizer_params, features, embed, None, key)[1]

    def embed_images_with_states(
        self, params: Params, pixels: Float[Array, "I h w C"], key: Key[Array, ""] | None = None
    ) -> ImageStates:
        """Compute visual embeddings and the results of all earlier stages, for all crops at once.

        Logits and probabilities contain only real words, without padding words. If the caller uses
        these arrays, removing the padding gathers them from all devices; otherwise, this costs
        nothing.
        """
        c = self.config.visual_tokenizer
        vision = self.encode_vision(params, pixels)
        merged = merge_patches(vision[-1], c.hidden_stride)
        tokens = apply(VisualTokenizer(c), params["visual_tokenizer"], merged, key)
        embeddings = embed_words(tokens.probabilities, params["visual_embedding"])
        unpadded = (x[..., : c.num_words] for x in (tokens.logits, tokens.probabilities))
        return ImageStates(vision, VisualTokens(tokens.features, *unpadded), embeddings)

    def decoder(self, *, remat: bool = False) -> Decoder:
        """Return the decoder module, with the model's attention kernel and KV cache dtype."""
        setting = KernelSetting(self.attention_kernel, self.platform)
        return Decoder(
            self.config.decoder,
            remat=remat,
            kernel_setting=setting,
            kv_cache_dtype=self.kv_cache_dtype,
        )

    def empty_cache(self, num_rows: int, max_length: int, dtype: DTypeLike) -> Cache:
        """Create an empty cache for `extend` and `decode`.

        Args:
          num_rows: Number of rows, B.
          max_length: Number of positions per row that fit into the cache.
          dtype: Dtype of the activations.
        """
        return empty_cache(self.config.decoder, num_rows, max_length, dtype, self.kv_cache_dtype)

    def embed_inputs(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        visual: Float[Array, "I M D"] | None,
    ) -> Float[Array, "B T D"]:
        """Embed text ids, image indicators and visual tokens as one sequence.

        Args:
          params: The parameters, as described in `Ovis`.
          tokens: Token ids, as in `Inputs`.
          visual: Embeddings of the visual tokens, in order of appearance in the batch.
        """
        text, table = params["decoder"]["embed"], params["visual_embedding"]
        dtype = activation_dtype(params)
        x = lookup(text, jnp.maximum(tokens, 0), dtype)  # [B, T, D]
        # The ids -301 to -305 are the last five rows of the unpadded table, in this order.
        row = self.config.visual_tokenizer.num_words + (IMAGE_START - tokens)
        indicators = lookup(table, jnp.maximum(row, 0), dtype)
        x = jnp.where((tokens <= IMAGE_START)[..., None], indicators, x)
        if visual is None:
            return x
        slots = tokens == IMAGE_SLOT
        order = jnp.cumsum(slots.reshape(-1)).reshape(slots.shape) - 1  # [B, T]
        visual = visual.reshape(-1, visual.shape[-1])  # [I M, D]
        return jnp.where(slots[..., None], visual[jnp.maximum(order, 0)], x)

    def decode_hidden_states(
        self, params: Params, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Run the decoder's blocks without a cache; return the output of the last block.

        Args:
          params: The parameters, as described in `Ovis`.
          x: Embeddings from `embed_inputs`.
          positions: Positions, from 0 in each row; -1 at padding.
        """
        # The logits are not used, so XLA does not compute them.
        out = apply(self.decoder(remat=self.remat), params["decoder"], x, positions)
        return out.hidden_states[-1]

    def last_hidden_states(
        self, params: Params, inputs: Inputs, key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """Compute the output of the last decoder block at every position, without a cache.

        As in `embed_images`, the visual embeddings are computed in chunks.
        """
        pixels = jnp.asarray(inputs.pixels)
        visual = self.embed_images(params, pixels, key) if len(pixels) else None
        x = self.embed_inputs(params, jnp.asarray(inputs.tokens), visual)
        return self.decode_hidden_states(params, x, jnp.asarray(inputs.positions))

    def unembed_weights(self, params: Params) -> tuple[Float[Array, "D"], Weight]:
        """Return the scale of the final norm and the output matrix, for `decoder.unembed`."""
        decoder = params["decoder"]
        table = decoder["embed" if self.config.decoder.tie_embeddings else "unembed"]
        return decoder["final_norm"], table

    def forward(
        self, params: Params, inputs: Inputs, key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "B T V"], ForwardStates]:
        """Compute float32 logits at every position without a cache, and return all stages, too."""
        pixels = jnp.asarray(inputs.pixels)
        images = self.embed_images_with_states(params, pixels, key) if len(pixels) else None
        visual = None if images is None else images.embeddings
        x = self.embed_inputs(params, jnp.asarray(inputs.tokens), visual)
        decoder = self.decoder(remat=self.remat)
        out = apply(decoder, params["decoder"], x, jnp.asarray(inputs.positions))
        return out.logits, ForwardStates(images, x, out.hidden_states)

    def prefill(
        self,
        params: Params,
        inputs: Inputs,
        max_length: int,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Prefill: read full prompts into a new cache.

        Args:
          params: The parameters, as described in `Ovis`.
          inputs: The prompts.
          max_length: Number of positions per row that fit into the cache, including the prompt.
          key: A random key, as described in `Ovis`.

        Returns:
          Float32 logits at each row's last position, and the cache.

        Raises:
          RequestError: The prompts are longer than `max_length`.
        """
        B, T = inputs.tokens.shape
        if T > max_length:
            raise RequestError(
                f"the cache is too short: max_length is {max_length}, the prompts take {T}"
            )
        positions = jnp.asarray(inputs.positions)
        pixels = jnp.asarray(inputs.pixels)
        visual = self.embed_images(params, pixels, key) if len(pixels) else None
        x = self.embed_inputs(params, jnp.asarray(inputs.tokens), visual)
        columns = jnp.argmax(positions, axis=1)
        out = apply(self.decoder(), params["decoder"], x, positions, None, columns, max_length)
        return out.logits[:, 0], Cache(out.key_values, jnp.max(positions, axis=1) + 1)

    def extend(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        visual: Float[Array, "B T D"],
        cache: Cache,
        rows: Int[Array, "B"],
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Prefill the next chunk of each prompt; the previous chunks are already in the cache.

        Args:
          params: The parameters, as described in `Ovis`.
          tokens: Token ids, as in `Inputs`.
          positions: Positions that continue each prompt, at least one per prompt; -1 at padding,
            which must be on the right. The positions before them are in the cache.
          visual: Embeddings of the visual tokens; only those at visual tokens are used.
          cache: The cache, which may have more rows and must have room for the new positions.
          rows: The row of the cache that each prompt continues.

        Returns:
          Float32 logits at each prompt's last position, and the new cache.
        """
        x = self.embed_inputs(params, tokens, None)
        x = jnp.where((tokens == IMAGE_SLOT)[..., None], visual.astype(x.dtype), x)
        columns = jnp.argmax(positions, axis=1)
        out = apply(self.decoder(), params["decoder"], x, positions, cache, columns, None, rows)
        lengths = cache.lengths.at[rows].set(jnp.max(positions, axis=1) + 1)
        return out.logits[:, 0], Cache(out.key_values, lengths)

    def decode(
        self, params: Params, tokens: Int[Array, "B"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Read one text token per row; return float32 logits for the next token, and the cache."""
        table = params["decoder"]["embed"]
        x = lookup(table, tokens, activation_dtype(params), in_loop=True)[:, None]  # [B, 1, D]
        positions = cache.lengths[:, None]  # [B, 1]
        out = apply(self.decoder(), params["decoder"], x, positions, cache)
        return out.logits[:, 0], Cache(out.key_values, cache.lengths + 1)


def forward(
    model: Ovis, params: Params, inputs: Inputs, *, return_states: bool = False
) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], ForwardStates]:
    """Compute float32 logits at every position.

    Args:
      model: The model; static.
      params: Parameters of the model, on any device or mesh.
      inputs: Model inputs from `Processor`.
      return_states: Whether to also return the results of all stages.

    Raises:
      TypeError: An argument has the wrong type.
    """
    check_argument_types(
        "forward", model=(model, Ovis), params=(params, Mapping), inputs=(inputs, Inputs)
    )
    return _forward(model, params, inputs, return_states)


@partial(jax.jit, static_argnums=(0, 3))
@allow_explicit_mesh
def _forward(
    model: Ovis, params: Params, inputs: Inputs, return_states: bool
) -> Float[Array, "B T V"] | tuple[Float[Array, "B T V"], ForwardStates]:
    if return_states:
        return model.forward(params, inputs)
    hidden = model.last_hidden_states(params, inputs)
    return unembed(model.config.decoder, hidden, *model.unembed_weights(params))
