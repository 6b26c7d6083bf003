"""The config of an Ovis model, read from the Hub's config.json into frozen dataclasses.

Every field that affects the computation is required. A missing field, or a value that this
implementation does not support, raises a `ConfigError` that names the field.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from ovis_jax.errors import OvisError
from ovis_jax.json_fields import (
    JsonObject,
    is_int,
    read_json,
    read_positive_number_fields,
    write_positive_number_fields,
)

TokenizeFunction = Literal["softmax", "gumbel_argmax", "st_argmax"]

ModelType = Literal["gemma2", "llama"]
"""The decoders that are supported, by their name in transformers."""

NUM_IMAGE_INDICATORS = 5
"""Number of rows at the end of the visual embedding table that belong to the ids -301 to -305."""

# Field names in the Hub's config.json by our field names, where the two differ.
_SHARED_NAMES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
}
_VISION_NAMES = _SHARED_NAMES | {"norm_eps": "layer_norm_eps"}
_DECODER_NAMES = _SHARED_NAMES | {
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
}
_LLAMA3_ROPE = {"rope_type": "llama3"}

LLAMA_FIELDS: Mapping[str, Any] = {
    "model_type": "llama",
    "activation": "silu",
    "norm_offset": 0,
    "post_norms": False,
    "scale_embeddings": False,
    "sliding_window": None,
    "attn_softcap": None,
    "final_softcap": None,
}
"""The fields of `DecoderConfig` that all Llama decoders share."""

_FORMATTERS = {"gemma2": "GemmaConversationFormatter", "llama": "Llama3ConversationFormatter"}
""""conversation_formatter_class" in config.json, by the decoder's model type."""


@dataclass(frozen=True)
class VisionConfig:
    """Config of the SigLIP vision encoder. Sizes are in pixels or channels."""

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    image_size: int
    patch_size: int
    num_channels: int
    norm_eps: float

    @property
    def grid_size(self) -> int:
        """Number of patches along one side of a crop."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """P, the number of patches per crop."""
        return self.grid_size**2

    @classmethod
    def from_hf(cls, config: JsonObject) -> Self:
        """Create the config from `visual_tokenizer_config.backbone_config` in config.json."""
        config.require_value("model_type", "siglip_vision_model")
        config.require_value("hidden_act", "gelu_pytorch_tanh")
        vision = cls(**read_positive_number_fields(cls, config, _VISION_NAMES))
        config.require_divisor("num_attention_heads", vision.num_heads, "hidden_size", vision.width)
        if vision.patch_size > vision.image_size:
            raise config.error(
                "patch_size", vision.patch_size, f"at most image_size {vision.image_size}"
            )
        return vision

    def to_hf(self) -> dict[str, Any]:
        """Return the field `visual_tokenizer_config.backbone_config` of config.json."""
        return {
            "model_type": "siglip_vision_model",
            "hidden_act": "gelu_pytorch_tanh",
            **write_positive_number_fields(self, _VISION_NAMES),
            "attention_dropout": 0.0,
        }


@dataclass(frozen=True)
class VisualTokenizerConfig:
    """Config of the visual tokenizer, which turns vision features into visual tokens.

    Attributes:
      vision: The vision encoder.
      vocab_size: U, the number of rows in the visual embedding table, including the image
        indicators.
      hidden_stride: Side length, in patches, of the square block that becomes one visual token.
      tokenize_function: The function that turns logits into a distribution over visual words.
      tau: Temperature in the gradient of the function "gumbel_argmax".
      norm_eps: Epsilon of the head's LayerNorm. Config files do not state this epsilon, so the
        default of torch.nn.LayerNorm is used.
    """

    vision: VisionConfig
    vocab_size: int
    hidden_stride: int
    tokenize_function: TokenizeFunction
    tau: float = 1.0
    norm_eps: float = 1e-5

    @property
    def num_words(self) -> int:
        """W, the number of visual words in the softmax, without the image indicators."""
        return self.vocab_size - NUM_IMAGE_INDICATORS

    @property
    def merged_grid_size(self) -> int:
        """Number of visual tokens along one side of a crop, including zero padding."""
        return -(-self.vision.grid_size // self.hidden_stride)

    @property
    def tokens_per_crop(self) -> int:
        """M, the number of visual tokens per crop."""
        return self.merged_grid_size**2

    @property
    def merged_width(self) -> int:
        """Number of channels in a merged block of patches."""
        return self.hidden_stride**2 * self.vision.width

    @classmethod
    def from_hf(cls, config: JsonObject) -> Self:
        """Create the config from `visual_tokenizer_config` in config.json."""
        config.require_value("model_type", "siglip_visual_tokenizer")
        if config.get_optional("drop_cls_token", False):
            raise config.error("drop_cls_token", True, "false: SigLIP has no class token")
        if config.get_optional("depths", None):
            raise config.error("depths", config.get("depths"), "null: all blocks are used")
        function = config.get("tokenize_function")
        if function not in get_args(TokenizeFunction):
            known = ", ".join(get_args(TokenizeFunction))
            raise config.error("tokenize_function", function, f"one of {known}")
        vocab_size = config.get_positive_int("vocab_size")
        if vocab_size <= NUM_IMAGE_INDICATORS:
            raise config.error(
                "vocab_size", vocab_size, f"more than the {NUM_IMAGE_INDICATORS} image indicators"
            )
        return cls(
            vision=VisionConfig.from_hf(config.get_object("backbone_config")),
            vocab_size=vocab_size,
            hidden_stride=config.get_positive_int("hidden_stride"),
            tokenize_function=function,
            tau=config.get_positive_number("tau") if "tau" in config.values else 1.0,
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the field `visual_tokenizer_config` of config.json."""
        return {
            "model_type": "siglip_visual_tokenizer",
            "vocab_size": self.vocab_size,
            "hidden_stride": self.hidden_stride,
            "tokenize_function": self.tokenize_function,
            "tau": self.tau,
            "depths": None,
            "drop_cls_token": False,
            "backbone_kwargs": {},
            "backbone_config": self.vision.to_hf(),
        }


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies for long contexts, as in Llama 3.1 (rope type "llama3").

    Attributes:
      factor: Divisor of the low frequencies.
      low_freq_factor: A frequency with fewer turns than this within the original context is low.
      high_freq_factor: A frequency with more turns than this within the original context is not
        changed. Between the two factors, the frequency is interpolated.
      original_max_position_embeddings: Length of the original context in positions.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    @classmethod
    def from_hf(cls, rope: JsonObject) -> Self:
        """Create the scaling from `rope_scaling` or `rope_parameters` in `llm_config`."""
        scaling = cls(**read_positive_number_fields(cls, rope, {}))
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        if high <= low:
            raise rope.error("high_freq_factor", high, f"more than low_freq_factor {low}")
        return scaling


@dataclass(frozen=True)
class DecoderConfig:
    """Config of the decoder: Gemma2 by default, or Llama with the fields in `LLAMA_FIELDS`.

    Attributes:
      sliding_window: Number of visible positions in every second block; None for no window.
      query_pre_attn_scalar: Attention scores are multiplied by this number to the power of -0.5.
      attn_softcap: Soft cap of attention scores; None for no soft capping.
      final_softcap: Soft cap of logits; None for no soft capping.
      rope_theta: Base of the rotary frequencies.
      tie_embeddings: Whether the output matrix is the embedding table.
      model_type: The type of the decoder, by its name in transformers.
      activation: Activation of the gated MLP; "gelu" is the tanh approximation.
      norm_offset: Number added to the scale of every RMSNorm: 1 in Gemma2, 0 in Llama.
      post_norms: Whether blocks also have norms after attention and after the MLP, not only before
        them.
      scale_embeddings: Whether input embeddings are multiplied by sqrt(width).
      rope_scaling: Scaling of the rotary frequencies; None for no scaling.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    sliding_window: int | None
    query_pre_attn_scalar: float
    attn_softcap: float | None
    final_softcap: float | None
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool = True
    model_type: ModelType = "gemma2"
    activation: Literal["gelu", "silu"] = "gelu"
    norm_offset: Literal[0, 1] = 1
    post_norms: bool = True
    scale_embeddings: bool = True
    rope_scaling: RopeScaling | None = None

    @property
    def supports_float16(self) -> bool:
        """Whether activations stay in the range of float16. The activations of Gemma2 exceed it."""
        return self.model_type != "gemma2"

    def window(self, block: int) -> int | None:
        """Return the sliding window of a block in positions; None for a global block."""
        return self.sliding_window if block % 2 == 0 else None

    @classmethod
    def from_hf(cls, config: JsonObject, *, disable_tie_weight: bool) -> Self:
        """Create the config from `llm_config` and the top-level field `disable_tie_weight`.

        Either `disable_tie_weight` or `tie_word_embeddings` in `llm_config` unties the embeddings.
        """
        model_type = config.get("model_type")
        if model_type not in get_args(ModelType):
            expected = " or ".join(map(repr, get_args(ModelType)))
            raise config.error("model_type", model_type, expected)
        config.require_value("attention_bias", False)
        rope_theta, rope_scaling = _read_rope(config)
        config = JsonObject({**config.values, "rope_theta": rope_theta}, config.name)
        if model_type == "llama":
            config.require_value("hidden_act", "silu")
            config.require_value("mlp_bias", False)
            scale = {"query_pre_attn_scalar": config.get_positive_int("head_dim")}
            config = JsonObject({**config.values, **scale}, config.name)
            specific = {**LLAMA_FIELDS, "rope_scaling": rope_scaling}
            tied = bool(config.get("tie_word_embeddings"))  # transformers' default is not Gemma's
        else:
            config.require_value("hidden_activation", "gelu_pytorch_tanh")
            config.require_absent("use_bidirectional_attention", "false: attention is causal")
            specific = {
                "sliding_window": config.get_positive_int("sliding_window"),
                "attn_softcap": config.get_positive_number("attn_logit_softcapping"),
                "final_softcap": config.get_positive_number("final_logit_softcapping"),
            }
            tied = bool(config.get_optional("tie_word_embeddings", True))
        numbers = read_positive_number_fields(cls, config, _DECODER_NAMES)
        decoder = cls(**numbers, **specific, tie_embeddings=tied and not disable_tie_weight)
        config.require_divisor(
            "num_key_value_heads", decoder.num_kv_heads, "num_attention_heads", decoder.num_heads
        )
        types = config.get_optional("layer_types", None)
        alternating = ["sliding_attention", "full_attention"] * decoder.depth
        if model_type == "gemma2" and types is not None and types != alternating[: decoder.depth]:
            expected = "alternating sliding_attention and full_attention, sliding first"
            raise config.error("layer_types", types, expected)
        if decoder.head_dim % 2:
            expected = "an even number: rotary embedding rotates pairs of channels"
            raise config.error("head_dim", decoder.head_dim, expected)
        return decoder

    def to_hf(self) -> dict[str, Any]:
        """Return the field `llm_config` of config.json."""
        numbers = write_positive_number_fields(self, _DECODER_NAMES)
        shared = {
            "model_type": self.model_type,
            "attention_bias": False,
            "attention_dropout": 0.0,
            **numbers,
        }
        if self.model_type == "llama":
            del shared["query_pre_attn_scalar"]  # Llama has no such field; it is head_dim
            scaling = self.rope_scaling
            return {
                **shared,
                "architectures": ["LlamaForCausalLM"],
                "hidden_act": "silu",
                "mlp_bias": False,
                "max_position_embeddings": 131072,
                "rope_scaling": None if scaling is None else asdict(scaling) | _LLAMA3_ROPE,
                "tie_word_embeddings": self.tie_embeddings,
            }
        return {
            **shared,
            "architectures": ["Gemma2ForCausalLM"],
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_act": "gelu_pytorch_tanh",
            "cache_implementation": "hybrid",
            "max_position_embeddings": 8192,
            "sliding_window": self.sliding_window,
            "attn_logit_softcapping": self.attn_softcap,
            "final_logit_softcapping": self.final_softcap,
        }


def _read_rope(config: JsonObject) -> tuple[float, RopeScaling | None]:
    """Read the base and the scaling of the rotary angles from `llm_config`.

    transformers 4 writes `rope_theta`, and `rope_scaling` if the angles are scaled. transformers 5
    writes both under `rope_parameters`.
    """
    config.require_absent("partial_rotary_factor", "1.0: all channels are rotated", allowed=(1,))
    is_llama = config.get("model_type") == "llama"
    stated = [config] if "rope_theta" in config.values else []
    scalings: list[tuple[JsonObject, RopeScaling | None]] = []
    for key in ("rope_scaling", "rope_parameters"):
        if not config.get_optional(key, None):
            continue
        rope = config.get_object(key)
        kinds = {name: rope.values[name] for name in ("rope_type", "type") if name in rope.values}
        scaled = is_llama and "llama3" in kinds.values()
        names = {field.name for field in fields(RopeScaling)} if scaled else set()
        for name, value in {**kinds, **rope.values}.items():  # the rope type first
            if name in kinds and is_llama and value not in ("default", "llama3"):
                raise rope.error(name, value, "'llama3' or 'default', the supported rope types")
            if name in kinds:
                rope.require_value(name, "llama3" if scaled else "default")
            elif name == "partial_rotary_factor":
                rope.require_absent(name, "1.0: all channels are rotated", allowed=(1,))
            elif name == "rope_theta":
                stated.append(rope)
            elif name not in names and value is not None:
                kind = "llama3" if scaled else "default"
                raise rope.error(name, value, f"no such field for the rope type {kind!r}")
        if kinds:
            scalings.append((rope, RopeScaling.from_hf(rope) if scaled else None))
    for other in stated[1:]:
        found, expected = other.get("rope_theta"), stated[0].get("rope_theta")
        if found != expected:
            raise other.error("rope_theta", found, f"{expected}, as in {stated[0].name}")
    for other, scaling in scalings[1:]:
        if scaling != scalings[0][1]:
            raise config.error(
                "rope_parameters", other.values, f"the scaling in {scalings[0][0].name}"
            )
    theta = (stated or [config])[0].get_positive_number("rope_theta")
    return theta, scalings[0][1] if scalings else None


@dataclass(frozen=True)
class OvisConfig:
    """Config of a complete Ovis1.6 model.

    Attributes:
      visual_tokenizer: Vision encoder and visual tokenizer.
      decoder: The language model.
      multimodal_max_length: Maximum prompt length in positions, where each crop takes M positions.
      eos_ids: Ids that end an answer.
      bos_id: Id that starts every prompt.
      pad_id: Token id of padding.
    """

    visual_tokenizer: VisualTokenizerConfig
    decoder: DecoderConfig
    multimodal_max_length: int
    eos_ids: tuple[int, ...]
    bos_id: int
    pad_id: int

    @property
    def vision(self) -> VisionConfig:
        """The config of the vision encoder."""
        return self.visual_tokenizer.vision

    @property
    def family(self) -> str:
        """Name of the published models with this decoder, without their size."""
        return {"gemma2": "Ovis1.6-Gemma2", "llama": "Ovis1.6-Llama3.2"}[self.decoder.model_type]

    def check_compute_dtype(self, dtype: str) -> None:
        """Check that the model can compute in a dtype, such as "bfloat16".

        Raises:
          OvisError: The dtype is float16, and the activations of the decoder exceed its range.
        """
        if dtype == "float16" and not self.decoder.supports_float16:
            raise OvisError(
                "dtype float16: the activations of Gemma2 exceed its range, which ends at 65504;"
                " use bfloat16 or float32"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any]) -> Self:
        """Create the config from the parsed config.json and generation_config.json of a Hub folder.

        Raises:
          ConfigError: A field that affects the computation is missing or not supported.
        """
        top = JsonObject(config, "config.json")
        top.require_value("model_type", "ovis")
        llm = top.get_object("llm_config")
        vision = top.get_object("visual_tokenizer_config")
        parts = (llm, vision, vision.get_object("backbone_config"))
        for key in ("quantization_config", "compression_config"):
            for part in parts:
                part.require_absent(key, "none: give a checkpoint whose weights are not quantized")
        expected = "none, or that of GPTQ: give a checkpoint whose weights are not quantized"
        top.require_absent("compression_config", expected)
        settings = top.get_optional("quantization_config", None)
        if isinstance(settings, Mapping) and settings.get("quant_method") == "gptq":
            read_gptq_group_size(top.get_object("quantization_config"))
        else:
            top.require_absent("quantization_config", expected)
        untied = bool(top.get_optional("disable_tie_weight", False))
        decoder = DecoderConfig.from_hf(llm, disable_tie_weight=untied)
        top.require_value("conversation_formatter_class", _FORMATTERS[decoder.model_type])
        stops = JsonObject(generation, "generation_config.json")
        eos = stops.get("eos_token_id")
        eos_ids = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        ovis = cls(
            visual_tokenizer=VisualTokenizerConfig.from_hf(vision),
            decoder=decoder,
            multimodal_max_length=top.get_positive_int("multimodal_max_length"),
            eos_ids=eos_ids,
            bos_id=stops.get("bos_token_id"),
            pad_id=stops.get("pad_token_id"),
        )
        named_ids = [("eos_token_id", i) for i in eos_ids]
        for name, i in [*named_ids, ("bos_token_id", ovis.bos_id), ("pad_token_id", ovis.pad_id)]:
            if not is_int(i) or not 0 <= i < ovis.decoder.vocab_size:
                raise stops.error(name, i, f"an id below vocab_size {ovis.decoder.vocab_size}")
        width = top.get_optional("hidden_size", ovis.decoder.width)
        if width != ovis.decoder.width:
            raise top.error("hidden_size", width, f"llm_config.hidden_size {ovis.decoder.width}")
        return ovis

    def to_hf(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the contents of config.json and generation_config.json that `from_hf` reads."""
        ids = {"bos_token_id": self.bos_id, "pad_token_id": self.pad_id}
        is_gemma2 = self.decoder.model_type == "gemma2"
        config = {
            "architectures": ["Ovis"],
            "auto_map": {
                "AutoConfig": "configuration_ovis.OvisConfig",
                "AutoModelForCausalLM": "modeling_ovis.Ovis",
            },
            "model_type": "ovis",
            "conversation_formatter_class": _FORMATTERS[self.decoder.model_type],
            "disable_tie_weight": not self.decoder.tie_embeddings,
            "hidden_size": self.decoder.width,
            "llm_attn_implementation": "eager" if is_gemma2 else "sdpa",
            "llm_config": self.decoder.to_hf() | ids | {"eos_token_id": self.eos_ids[0]},
            "multimodal_max_length": self.multimodal_max_length,
            "visual_tokenizer_config": self.visual_tokenizer.to_hf(),
        }
        cache = {"cache_implementation": "hybrid"} if is_gemma2 else {}
        return config, ids | {"eos_token_id": list(self.eos_ids)} | cache

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read config.json and generation_config.json of a checkpoint folder.

        If generation_config.json has no pad id, the id of the tokenizer's pad token is used.

        Raises:
          ConfigError: A file or field is missing, cannot be read or is not supported.
        """
        names = ("config.json", "generation_config.json")
        config, generation = (read_json(folder / name) for name in names)
        if generation.get("pad_token_id") is None:
            generation["pad_token_id"] = _read_pad_id(folder)
        return cls.from_hf(config, generation)


def _read_pad_id(folder: Path) -> int:
    """Return the id of the pad token that tokenizer_config.json names."""
    name = "tokenizer_config.json"
    config = JsonObject(read_json(folder / name), name)
    token = config.get("pad_token")
    text = token.get("content") if isinstance(token, Mapping) else token
    added = config.get_optional("added_tokens_decoder", None)
    if added is None:  # transformers 5 lists the added tokens only in tokenizer.json
        listed = read_json(folder / "tokenizer.json").get("added_tokens", ())
        added = {entry["id"]: entry for entry in listed}
    for i, entry in added.items():
        if entry["content"] == text:
            return int(i)
    raise config.error("pad_token", token, "one of the added tokens of the tokenizer")


_GPTQ_SETTINGS: Mapping[str, tuple[Any, bool]] = {
    "quant_method": ("gptq", False),
    "bits": (4, True),
    "sym": (True, True),
    "desc_act": (False, True),
    "checkpoint_format": ("gptq", False),
    "is_marlin_format": (False, False),
    "lm_head": (False, False),
    "dynamic": (None, False),
}
"""The only supported value of each GPTQ setting, and whether the setting is required."""


def read_gptq_group_size(settings: JsonObject) -> int:
    """Check the settings of GPTQ, and return the number of inputs per group.

    Args:
      settings: `quantization_config` in config.json, or the content of quantize_config.json.

    Raises:
      ConfigError: A setting is missing or not supported.
    """
    advice = "; give a checkpoint with this setting, or one that is not quantized"
    for key, (supported, required) in _GPTQ_SETTINGS.items():
        found = settings.get(key) if required else settings.get_optional(key, supported)
        if found != supported:
            raise settings.error(key, found, f"{supported!r}{advice}")
    group_size = settings.get("group_size")
    if not is_int(group_size) or group_size <= 0 or group_size % 8:
        raise settings.error("group_size", group_size, f"a multiple of 8{advice}")
    return group_size
