"""The config of an Ovis model, read from the Hub's config.json into frozen dataclasses.

Every field that affects the computation is required. A missing field, or a value that this
implementation does not support, raises a `ConfigError` that names it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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
    "attn_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
    "norm_eps": "rms_norm_eps",
}


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
      norm_eps: Epsilon of the head's LayerNorm. Config files do not state it, so it is the default
        of torch.nn.LayerNorm.
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
class DecoderConfig:
    """Config of the Gemma2 decoder."""

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    sliding_window: int
    query_pre_attn_scalar: float
    attn_softcap: float
    final_softcap: float
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool = True

    @property
    def supports_float16(self) -> bool:
        """Whether activations stay in the range of float16; those of Gemma2 exceed it."""
        return False

    def window(self, block: int) -> int | None:
        """Return the sliding window of a block in positions; None for a global block."""
        return self.sliding_window if block % 2 == 0 else None

    @classmethod
    def from_hf(cls, config: JsonObject, *, disable_tie_weight: bool) -> Self:
        """Create the config from `llm_config`; `disable_tie_weight` is a top-level field.

        Either `disable_tie_weight` or `tie_word_embeddings` in `llm_config` unties the embeddings.
        """
        config.require_value("model_type", "gemma2")
        config.require_value("hidden_activation", "gelu_pytorch_tanh")
        config.require_value("attention_bias", False)
        config.require_absent("use_bidirectional_attention", "false: attention is causal")
        config = JsonObject({**config.values, "rope_theta": _read_rope_theta(config)}, config.name)
        numbers = read_positive_number_fields(cls, config, _DECODER_NAMES)
        untied = disable_tie_weight or not config.get_optional("tie_word_embeddings", True)
        decoder = cls(**numbers, tie_embeddings=not untied)
        config.require_divisor(
            "num_key_value_heads", decoder.num_kv_heads, "num_attention_heads", decoder.num_heads
        )
        types = config.get_optional("layer_types", None)
        alternating = ["sliding_attention", "full_attention"] * decoder.depth
        if types is not None and types != alternating[: decoder.depth]:
            expected = "alternating sliding_attention and full_attention, sliding first"
            raise config.error("layer_types", types, expected)
        if decoder.head_dim % 2:
            expected = "an even number: rotary embedding rotates pairs of channels"
            raise config.error("head_dim", decoder.head_dim, expected)
        return decoder

    def to_hf(self) -> dict[str, Any]:
        """Return the field `llm_config` of config.json."""
        return {
            "model_type": "gemma2",
            "architectures": ["Gemma2ForCausalLM"],
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_act": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "cache_implementation": "hybrid",
            "max_position_embeddings": 8192,
            **write_positive_number_fields(self, _DECODER_NAMES),
        }


def _read_rope_theta(config: JsonObject) -> float:
    """Read the base of the rotary angles from `llm_config`.

    transformers 4 writes `rope_theta`, and `rope_scaling` if the angles are scaled. transformers 5
    writes all of it under `rope_parameters`.
    """
    config.require_absent("partial_rotary_factor", "1.0: all channels are rotated", allowed=(1,))
    stated = [config] if "rope_theta" in config.values else []
    for key in ("rope_scaling", "rope_parameters"):
        if not config.get_optional(key, None):
            continue
        rope = config.get_object(key)
        for name, value in rope.values.items():
            if name in ("rope_type", "type"):
                rope.require_value(name, "default")
            elif name == "partial_rotary_factor":
                rope.require_absent(name, "1.0: all channels are rotated", allowed=(1,))
            elif name == "rope_theta":
                stated.append(rope)
            elif value is not None:
                raise rope.error(name, value, "no such field: Gemma2 does not scale rotary angles")
    for other in stated[1:]:
        found, expected = other.get("rope_theta"), stated[0].get("rope_theta")
        if found != expected:
            raise other.error("rope_theta", found, f"{expected}, as in {stated[0].name}")
    return (stated or [config])[0].get_positive_number("rope_theta")


@dataclass(frozen=True)
class OvisConfig:
    """Config of a complete Ovis1.6-Gemma2 model.

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
        top.require_value("conversation_formatter_class", "GemmaConversationFormatter")
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
        stops = JsonObject(generation, "generation_config.json")
        eos = stops.get("eos_token_id")
        eos_ids = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        ovis = cls(
            visual_tokenizer=VisualTokenizerConfig.from_hf(vision),
            decoder=DecoderConfig.from_hf(
                llm, disable_tie_weight=bool(top.get_optional("disable_tie_weight", False))
            ),
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
        config = {
            "architectures": ["Ovis"],
            "auto_map": {
                "AutoConfig": "configuration_ovis.OvisConfig",
                "AutoModelForCausalLM": "modeling_ovis.Ovis",
            },
            "model_type": "ovis",
            "conversation_formatter_class": "GemmaConversationFormatter",
            "disable_tie_weight": not self.decoder.tie_embeddings,
            "hidden_size": self.decoder.width,
            "llm_attn_implementation": "eager",
            "llm_config": self.decoder.to_hf() | ids | {"eos_token_id": self.eos_ids[0]},
            "multimodal_max_length": self.multimodal_max_length,
            "visual_tokenizer_config": self.visual_tokenizer.to_hf(),
        }
        return config, ids | {"eos_token_id": list(self.eos_ids), "cache_implementation": "hybrid"}

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read config.json and generation_config.json of a checkpoint folder.

        Raises:
          ConfigError: A file or field is missing, cannot be read or is not supported.
        """
        names = ("config.json", "generation_config.json")
        return cls.from_hf(*(read_json(folder / name) for name in names))


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
"""The only supported values of settings of GPTQ, and whether a setting is required."""


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
