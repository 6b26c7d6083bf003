"""Every field that decides the mathematics is read, checked and written back."""

import copy
import json
import shutil

import pytest
from golden_copies import GOLDEN_LLAMA

from ovis_jax import presets
from ovis_jax.config import OvisConfig
from ovis_jax.errors import ConfigError
from ovis_jax.json_fields import read_json

PRESETS = [presets.tiny, presets.benchmark, presets.ovis1_6_gemma2_9b, presets.ovis1_6_gemma2_27b]
PRESETS += [presets.tiny_llama, presets.ovis1_6_llama3_2_3b]


@pytest.mark.parametrize("preset", PRESETS)
def test_written_and_read_back(preset):
    config, generation = json.loads(json.dumps(preset().to_hf()))
    assert OvisConfig.from_hf(config, generation) == preset()


@pytest.mark.parametrize("name", ["tiny-f32", "tiny-bf16-sharded"])
def test_the_golden_configs_are_the_tiny_preset(golden, name):
    assert OvisConfig.from_folder(golden / name) == presets.tiny()


def test_the_golden_llama_is_the_tiny_llama_preset(tmp_path):
    """The pad id is only in the files of the tokenizer."""
    assert OvisConfig.from_folder(GOLDEN_LLAMA / "tiny-f32") == presets.tiny_llama()
    for name in ("config", "generation_config", "tokenizer", "tokenizer_config"):
        shutil.copyfile(GOLDEN_LLAMA / "tiny-f32" / f"{name}.json", tmp_path / f"{name}.json")
    path = tmp_path / "tokenizer_config.json"
    tokenizer = read_json(path)
    del tokenizer["added_tokens_decoder"]  # as transformers 5 writes it
    path.write_text(json.dumps(tokenizer))
    assert OvisConfig.from_folder(tmp_path) == presets.tiny_llama()
    path.write_text(json.dumps(tokenizer | {"pad_token": "<pad>"}))
    with pytest.raises(ConfigError, match="tokenizer_config.json: pad_token is '<pad>', expected"):
        OvisConfig.from_folder(tmp_path)


def llama(**changes) -> tuple[dict, dict]:
    """The config of the tiny Llama with changed fields in llm_config; ... removes a field."""
    config, generation = copy.deepcopy(presets.tiny_llama().to_hf())
    fields = {**config["llm_config"], **changes}
    config["llm_config"] = {key: value for key, value in fields.items() if value is not ...}
    return config, generation


ROPE = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"head_dim": ...}, "head_dim is missing"),
        ({"tie_word_embeddings": ...}, "tie_word_embeddings is missing"),
        ({"rope_theta": ...}, "rope_theta is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn', expected"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "type is 'linear', expected 'llama3"),
        ({"rope_scaling": {**ROPE, "rope_type": "default"}}, "factor is 32.0, .* 'default'"),
        ({"rope_scaling": {**ROPE, "rope_type": "llama3", "mscale": 1.0}}, "mscale is 1.0"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 32.0}}, "low_freq_factor is missing"),
        (
            {"rope_scaling": {**ROPE, "rope_type": "llama3", "high_freq_factor": 1.0}},
            "high_freq_factor is 1.0, expected more than low_freq_factor 1.0",
        ),
        (
            {"rope_parameters": {**ROPE, "rope_type": "llama3", "factor": 8.0}},
            "rope_parameters is .*, expected the scaling in config.json: llm_config: rope_scaling",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config is"),
    ],
)
def test_an_unsupported_llama_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        OvisConfig.from_hf(*llama(**changes))


def test_each_decoder_has_its_conversations_and_rope_types():
    config, generation = llama()
    config["conversation_formatter_class"] = "GemmaConversationFormatter"
    with pytest.raises(ConfigError, match="expected 'Llama3ConversationFormatter'"):
        OvisConfig.from_hf(config, generation)
    config, generation = copy.deepcopy(presets.tiny().to_hf())
    config["llm_config"]["rope_scaling"] = {**ROPE, "rope_type": "llama3"}
    with pytest.raises(ConfigError, match="rope_type is 'llama3', expected 'default'"):
        OvisConfig.from_hf(config, generation)


@pytest.mark.parametrize("scaled", [True, False])
def test_both_spellings_of_llama3_rope(scaled):
    rope = {**ROPE, "rope_type": "llama3"} if scaled else {"rope_type": "default"}
    spellings = [
        llama(rope_scaling=rope),
        llama(rope_scaling=..., rope_theta=..., rope_parameters={**rope, "rope_theta": 500000.0}),
    ]
    expected = presets.tiny_llama().decoder.rope_scaling if scaled else None
    for config, generation in spellings:
        decoder = OvisConfig.from_hf(config, generation).decoder
        assert (decoder.rope_theta, decoder.rope_scaling) == (500000.0, expected)


def test_sizes_that_follow():
    config = presets.ovis1_6_gemma2_9b()
    assert config.vision.num_patches == 729
    assert config.visual_tokenizer.tokens_per_crop == 196
    assert config.visual_tokenizer.merged_width == 4608
    assert config.visual_tokenizer.num_words == 65531
    assert [config.decoder.window(i) for i in range(4)] == [4096, None, 4096, None]
    assert [presets.tiny_llama().decoder.window(i) for i in range(2)] == [None, None]
    assert presets.tiny().visual_tokenizer.tokens_per_crop == 9


@pytest.mark.parametrize("fields, expected", [({"tau": 0.5}, 0.5), ({}, 1.0)])
def test_tau_is_read_and_written(fields, expected):
    config, generation = copy.deepcopy(presets.tiny().to_hf())
    tokenizer = config["visual_tokenizer_config"]
    del tokenizer["tau"]
    tokenizer.update(fields)
    read = OvisConfig.from_hf(config, generation)
    assert read.visual_tokenizer.tau == expected
    assert read.to_hf()[0]["visual_tokenizer_config"]["tau"] == expected


NEEDED = {
    "": ["model_type", "conversation_formatter_class", "multimodal_max_length", "llm_config"],
    "llm_config": [
        "model_type",
        "hidden_activation",
        "attention_bias",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "sliding_window",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "rope_theta",
        "rms_norm_eps",
    ],
    "visual_tokenizer_config": [
        "model_type",
        "vocab_size",
        "hidden_stride",
        "tokenize_function",
        "backbone_config",
    ],
    "visual_tokenizer_config.backbone_config": [
        "model_type",
        "hidden_act",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
        "num_channels",
        "layer_norm_eps",
    ],
}


def changed(section: str, key: str, *value) -> tuple[dict, dict]:
    """The tiny config with one field of a section set to a value, or removed."""
    config, generation = copy.deepcopy(presets.tiny().to_hf())
    inner = config
    for name in filter(None, section.split(".")):
        inner = inner[name]
    del inner[key]
    if value:
        inner[key] = value[0]
    return config, generation


@pytest.mark.parametrize(
    "section, key", [(section, key) for section, keys in NEEDED.items() for key in keys]
)
def test_a_missing_field_is_named(section, key):
    with pytest.raises(ConfigError, match=f"{key} is missing") as error:
        OvisConfig.from_hf(*changed(section, key))
    assert all(name in str(error.value) for name in section.split("."))


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        ("", "model_type", "llava", "model_type is 'llava', expected 'ovis'"),
        ("", "conversation_formatter_class", "QwenConversationFormatter", "Gemma"),
        ("", "multimodal_max_length", 0, "multimodal_max_length is 0"),
        ("", "hidden_size", 65, "hidden_size is 65, expected llm_config.hidden_size 64"),
        ("llm_config", "model_type", "qwen2", "model_type is 'qwen2', expected 'gemma2'"),
        ("llm_config", "hidden_activation", "gelu", "hidden_activation is 'gelu'"),
        ("llm_config", "attention_bias", True, "attention_bias is True"),
        ("llm_config", "sliding_window", None, "sliding_window is None"),
        ("llm_config", "attn_logit_softcapping", None, "attn_logit_softcapping is None"),
        ("llm_config", "query_pre_attn_scalar", -1, "query_pre_attn_scalar is -1"),
        ("llm_config", "num_key_value_heads", 3, "num_key_value_heads is 3, expected a divisor"),
        ("llm_config", "head_dim", 15, "head_dim is 15, expected an even number"),
        ("llm_config", "num_hidden_layers", True, "num_hidden_layers is True"),
        ("llm_config", "vocab_size", 600.0, "vocab_size is 600.0"),
        ("visual_tokenizer_config", "tokenize_function", "sparsemax", "one of softmax"),
        ("visual_tokenizer_config", "tau", 0, "tau is 0, expected a number above 0"),
        ("visual_tokenizer_config", "model_type", "clip_visual_tokenizer", "model_type"),
        ("visual_tokenizer_config", "drop_cls_token", True, "drop_cls_token is True"),
        ("visual_tokenizer_config", "depths", [3], "depths is"),
        ("visual_tokenizer_config", "vocab_size", 5, "more than the 5 image indicators"),
        ("visual_tokenizer_config.backbone_config", "hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("visual_tokenizer_config.backbone_config", "model_type", "clip", "model_type is 'clip'"),
        ("visual_tokenizer_config.backbone_config", "patch_size", 71, "patch_size is 71"),
    ],
)
def test_an_unsupported_value_is_named(section, key, value, message):
    with pytest.raises(ConfigError, match=message):
        OvisConfig.from_hf(*changed(section, key, value))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("rope_scaling", {"type": "linear"}, "rope_scaling: type is 'linear', expected 'default'"),
        ("layer_types", ["full_attention"] * 4, "layer_types is .*, sliding first"),
        (
            "rope_parameters",
            {"rope_theta": 1e4, "rope_type": "linear", "factor": 8.0},
            "llm_config: rope_parameters: rope_type is 'linear', expected 'default'",
        ),
        ("rope_parameters", {"rope_theta": 1e4, "factor": 8.0}, "rope_parameters: factor is 8.0"),
        (
            "rope_parameters",
            {"rope_theta": 1e6, "rope_type": "default"},
            "rope_parameters: rope_theta is 1000000.0, expected 10000.0, as in config.json: llm_c",
        ),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}, "full_attention is {"),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("partial_rotary_factor", 0.5, "llm_config: partial_rotary_factor is 0.5"),
        ("use_bidirectional_attention", True, "use_bidirectional_attention is True"),
        ("quantization_config", {"quant_method": "awq"}, "llm_config: quantization_config is {'q"),
    ],
)
def test_an_unsupported_addition_is_named(key, value, message):
    config, generation = copy.deepcopy(presets.tiny().to_hf())
    config["llm_config"][key] = value
    with pytest.raises(ConfigError, match=message):
        OvisConfig.from_hf(config, generation)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0, "factor": None}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
    ],
)
def test_both_spellings_of_the_rotary_angles(changes):
    config, generation = copy.deepcopy(presets.tiny().to_hf())
    del config["llm_config"]["rope_theta"]
    config["llm_config"] |= changes
    assert OvisConfig.from_hf(config, generation).decoder.rope_theta == 5e5


@pytest.mark.parametrize("section", [None, "visual_tokenizer_config", "backbone_config"])
def test_quantized_checkpoints_are_rejected(section):
    config, generation = copy.deepcopy(presets.tiny().to_hf())
    parts = {
        None: config,
        "visual_tokenizer_config": config["visual_tokenizer_config"],
        "backbone_config": config["visual_tokenizer_config"]["backbone_config"],
    }
    parts[section]["quantization_config"] = {"quant_method": "bitsandbytes"}
    with pytest.raises(ConfigError, match=f"{section or 'config.json'}: quantization_config is"):
        OvisConfig.from_hf(config, generation)
    parts[section]["quantization_config"] = None
    assert OvisConfig.from_hf(config, generation) == presets.tiny()


@pytest.mark.parametrize(
    "disable_tie_weight, tie_word_embeddings, tied",
    [(False, None, True), (False, True, True), (False, False, False), (True, True, False)],
)
def test_either_field_unties(disable_tie_weight, tie_word_embeddings, tied):
    config, generation = copy.deepcopy(presets.tiny().to_hf())
    config["disable_tie_weight"] = disable_tie_weight
    if tie_word_embeddings is not None:
        config["llm_config"]["tie_word_embeddings"] = tie_word_embeddings
    assert OvisConfig.from_hf(config, generation).decoder.tie_embeddings == tied


def test_stop_ids():
    config, generation = presets.tiny().to_hf()
    one = OvisConfig.from_hf(config, generation | {"eos_token_id": 1})
    assert one.eos_ids == (1,)
    with pytest.raises(ConfigError, match="generation_config.json: eos_token_id is 600"):
        OvisConfig.from_hf(config, generation | {"eos_token_id": [1, 600]})
    with pytest.raises(ConfigError, match="eos_token_id is missing"):
        OvisConfig.from_hf(config, {"bos_token_id": 2, "pad_token_id": 0})


def test_files_that_are_not_json_objects(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="config.json does not exist"):
        read_json(path)
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="symbolic link to .*/gone, which does not exist"):
        read_json(path)
    path.unlink()
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="contains a JSON list, expected an object"):
        read_json(path)
