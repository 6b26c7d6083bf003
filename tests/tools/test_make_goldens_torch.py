"""tools/make_goldens.py on a stand-in with the interface of the Hub's modeling_ovis.py."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from golden_copies import GOLDEN
from reference.ovis_torch import OvisTorch
from torch import Tensor, nn

from tools import make_goldens as tool
from tools.make_goldens import GoldenError

pytestmark = pytest.mark.torch


class VisualTokenizer(nn.Module):
    def __init__(self, reference: OvisTorch):
        super().__init__()
        self.backbone, self.head, self.merge = reference.vision, reference.head, reference.merge

    def forward(self, pixels: Tensor) -> Tensor:
        states = self.backbone(pixels, output_hidden_states=True).hidden_states
        return nn.functional.pad(self.head(self.merge(states[-1])).softmax(dim=-1), (0, 5))


class VisualEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight if input.is_floating_point() else super().forward(input)


class LanguageModel(nn.Module):
    """Gemma2 as transformers 4.46 has it: it scales the embeddings it is given."""

    def __init__(self, llm: Any):
        super().__init__()
        self.llm, self.model = llm, llm.model

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        use_cache: bool,
        position_ids: Tensor | None = None,
        num_logits_to_keep: int = 0,
    ) -> Any:
        return self.llm(
            inputs_embeds=inputs_embeds * inputs_embeds.shape[-1] ** 0.5,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=num_logits_to_keep,
        )


class StandIn:
    """The model of a golden checkpoint; its preprocessing gives what a golden case holds."""

    def __init__(self, checkpoint: str, case: dict[str, np.ndarray]):
        self.reference = reference = OvisTorch.from_folder(GOLDEN / checkpoint)
        self.case = case
        self.config = SimpleNamespace(multimodal_max_length=8192)
        self.visual_tokenizer = VisualTokenizer(reference)
        self.vte = VisualEmbedding.from_pretrained(reference.table.weight)
        self.llm = LanguageModel(reference.llm)
        self.wte = nn.Embedding.from_pretrained(reference.llm.model.embed_tokens.weight)

    def get_text_tokenizer(self) -> Any:
        return SimpleNamespace(pad_token_id=0)

    def get_visual_tokenizer(self) -> nn.Module:
        return self.visual_tokenizer

    def get_vte(self) -> nn.Module:
        return self.vte

    def get_llm(self) -> nn.Module:
        return self.llm

    def get_wte(self) -> nn.Module:
        return self.wte

    def preprocess_inputs(self, text: str, images: list, max_partition: int) -> tuple:
        pixels = self.case.get("pixel_values")
        ids = torch.tensor(self.case["input_ids"])
        return str(self.case["prompt"]), ids, None if pixels is None else torch.tensor(pixels)

    def merge_multimodal(
        self, text_input_ids: Tensor, text_attention_masks: Tensor, text_labels: None, pixel_values
    ) -> tuple:
        self.vte(torch.arange(64, 69))  # the indicators, as in the original
        visual = None
        if pixel_values[0] is not None:
            visual = self.vte(self.visual_tokenizer(pixel_values[0])).numpy()
        embeds = torch.tensor(self.reference.embed_inputs(text_input_ids[0].numpy(), visual))
        limit = self.config.multimodal_max_length
        embeds = embeds[None, :limit]
        return None, embeds, None, torch.ones(embeds.shape[:2], dtype=torch.bool)


def load_case(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "cases" / "tiny-f32" / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", ["square", "two_images", "text_only"])
def test_every_stage_is_recorded(name: str):
    case = load_case(name)
    fields = tool.compute(StandIn("tiny-f32", case), "", [], max_new_tokens=5)
    tool.check_fields(fields, bfloat16=False)
    for field, found in fields.items():
        expected = case[field][:5] if field.startswith("gen_") else case[field]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), field
        if found.dtype.kind == "f":
            decoder = field in ("llm_blocks", "logits", "gen_margins")
            np.testing.assert_allclose(found, expected, atol=1e-2 if decoder else 1e-4, rtol=0)
        else:
            assert np.array_equal(found, expected), field


def test_vision_blocks_are_recorded_in_bfloat16():
    case = load_case("square")
    model = StandIn("tiny-f32", case)
    with torch.inference_mode(), tool._record(model, vision_blocks=True) as found:
        model.visual_tokenizer(torch.tensor(case["pixel_values"]))
    np.testing.assert_allclose(found["siglip_hidden"], case["siglip_hidden"], atol=1e-4, rtol=0)


def test_hooks_are_removed():
    """Those of this script; transformers keeps some of its own."""
    model = StandIn("tiny-f32", load_case("square"))

    def count_hooks() -> int:
        tool.compute(model, "", [], max_new_tokens=1)
        modules = [*model.visual_tokenizer.modules(), *model.llm.modules(), model.vte]
        return sum(len(module._forward_hooks) for module in modules)

    assert count_hooks() == count_hooks()


def test_cut_prompt():
    model = StandIn("tiny-f32", load_case("square"))
    model.config.multimodal_max_length = 20
    with pytest.raises(GoldenError, match="all 20 positions .* lower --max-partition"):
        tool.compute(model, "", [])


def test_padding_in_the_prompt():
    case = load_case("square")
    case["input_ids"][-1] = 0
    with pytest.raises(GoldenError, match="spells out the padding token"):
        tool.compute(StandIn("tiny-f32", case), "", [])


def test_preprocessing_that_fails():
    model = StandIn("tiny-f32", load_case("square"))
    del model.case["input_ids"]
    with pytest.raises(GoldenError, match="cannot preprocess the prompt: 'input_ids'"):
        tool.compute(model, "", [])
