"""A folder as transformers 5 saves it: configs, tokenizer and image processor."""

import json
from pathlib import Path
from typing import Any

import pytest
from golden_copies import GOLDEN, copy_golden
from transformers import (
    Gemma2Config,
    GemmaTokenizer,
    PreTrainedConfig,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from ovis_jax import presets
from ovis_jax.conversion.from_hf import convert_from_hf
from ovis_jax.loading import load

pytestmark = pytest.mark.torch

ROWS = json.loads((GOLDEN / "tokenizer_cases.json").read_text(encoding="utf-8"))


class VisualTokenizerConfig(PreTrainedConfig):
    """The original's config, whose backbone is a config of transformers."""

    model_type = "siglip_visual_tokenizer"

    def __init__(self, backbone_config: dict[str, Any] | None = None, **fields: Any):
        super().__init__(**fields)
        self.backbone_config = SiglipVisionConfig(**(backbone_config or {}))


class OvisConfig(PreTrainedConfig):
    """The original's config, whose parts are configs of transformers."""

    model_type = "ovis"

    def __init__(
        self,
        llm_config: dict[str, Any] | None = None,
        visual_tokenizer_config: dict[str, Any] | None = None,
        **fields: Any,
    ):
        super().__init__(**fields)
        self.llm_config = Gemma2Config(**(llm_config or {}))
        self.visual_tokenizer_config = VisualTokenizerConfig(**(visual_tokenizer_config or {}))


@pytest.fixture
def saved(tmp_path) -> Path:
    """The golden checkpoint, with all small files but generation_config.json saved again."""
    folder = copy_golden("tiny-f32", tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    for name in ("preprocessor_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    dtype = config.pop("torch_dtype")
    for part in (config, config["llm_config"], config["visual_tokenizer_config"]):
        part.pop("model_type", None)
        part.pop("torch_dtype", None)
    OvisConfig(**config, dtype=dtype).save_pretrained(folder)
    GemmaTokenizer.from_pretrained(GOLDEN / "tiny-f32").save_pretrained(folder)
    SiglipImageProcessor.from_pretrained(GOLDEN / "tiny-f32").save_pretrained(folder)
    return folder


def test_it_writes_the_other_spellings(saved):
    config = json.loads((saved / "config.json").read_text())
    assert (config["dtype"], config["transformers_version"][:2]) == ("float32", "5.")
    assert "torch_dtype" not in config and "rope_theta" not in config["llm_config"]
    assert config["llm_config"]["rope_parameters"]["rope_theta"] == 10000.0
    assert "added_tokens_decoder" not in json.loads((saved / "tokenizer_config.json").read_text())
    assert (saved / "tokenizer.model").exists()


def test_the_same_model_and_tokenizer(saved, tmp_path):
    for folder in (saved, tmp_path / "converted"):
        if folder != saved:
            convert_from_hf(saved, folder)
        ovis = load(folder)
        assert ovis.config == presets.tiny()
        assert ovis.processor.image_config == load(GOLDEN / "tiny-f32").processor.image_config
        for row in ROWS:
            assert ovis.processor.tokenizer.encode(row["text"]) == row["ids"]
            # transformers 5 saves <mask> as a special token, so texts without it would differ.
            decoded = ovis.processor.tokenizer.decode(row["ids"], skip_special_tokens=False)
            assert decoded == row["decoded"]
