"""Adapters that the `peft` library writes: the matrices that we add are the ones that it adds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear

from ovis_jax import presets
from ovis_jax.checkpoint.adapters import load_adapters
from ovis_jax.checkpoint.peft_adapters import find_peft_modules
from ovis_jax.sharding import param_shapes

# What peft 0.21 reads of transformers 5.
pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

CONFIG = presets.tiny()
MODULES = find_peft_modules(CONFIG)


def model_of_matrices() -> torch.nn.Module:
    """All matrices that can have an adapter, as `Linear` modules with the original's names."""
    root = torch.nn.Module()
    for path, name in MODULES.items():
        *parents, last = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        rows, columns = param_shapes(CONFIG)[path]
        module.add_module(last, torch.nn.Linear(columns, rows, bias=False))
    return root


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_dropout": 0.1},
        {"target_modules": r"llm\..*\.(q|k|v|o)_proj", "init_lora_weights": "gaussian"},
        {
            "target_modules": ["q_proj", "up_proj", "fc1", "head.0"],
            "exclude_modules": r"llm\.model\.layers\.2\..*",
            "rank_pattern": {"layers.1.self_attn.q_proj": 7, r"^llm.*\.up_proj": 2},
            "alpha_pattern": {"fc1": 3, r"layers\.0\.self_attn\.q_proj": 32},
            "use_rslora": True,
        },
        {"target_modules": ["q_proj", "fc2"], "layers_to_transform": [1], "lora_alpha": 16},
        {"target_modules": ["q_proj"], "layers_to_transform": 3, "layers_pattern": ["layers"]},
    ],
    ids=["all-linear", "rslora", "expression", "patterns", "one layer", "layers pattern"],
)
def test_same_products(tmp_path: Path, options: dict):
    torch.manual_seed(0)
    wrapped = get_peft_model(model_of_matrices(), LoraConfig(r=4, **options))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path / "peft")
    loaded = PeftModel.from_pretrained(model_of_matrices(), tmp_path / "peft")
    products = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
        for name, module in loaded.named_modules()
        if isinstance(module, Linear)
    }
    lora = load_adapters(tmp_path / "peft", CONFIG)
    assert {MODULES[path] for path in lora.matrix_paths} == products.keys()
    for path in lora.matrix_paths:
        a, b = (np.asarray(lora.weights[f"{path}/{factor}"]) for factor in ("lora_a", "lora_b"))
        expected = products[MODULES[path]]
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(lora.scale * b @ a, expected, rtol=1e-5, atol=1e-5)
