"""Adapters in the folder format of PEFT: what they compute, and what is rejected by its name."""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from golden_copies import GOLDEN, rewrite_shard
from random_adapters import random_adapters
from safetensors.numpy import save_file

from ovis_jax import presets
from ovis_jax.checkpoint.adapters import load_adapters, save_adapters
from ovis_jax.checkpoint.checkpoint_problems import CheckpointValidationError
from ovis_jax.checkpoint.key_map import make_hub_key_map
from ovis_jax.conversion.peft_export import export_peft_adapter
from ovis_jax.conversion.to_hf import export_to_hf
from ovis_jax.errors import ConfigError, OvisError
from ovis_jax.inputs.open_image import open_image
from ovis_jax.loading import load
from ovis_jax.model.ovis import forward

CONFIG = presets.tiny()
PLAIN = {"peft_type": "LORA", "task_type": None, "r": 4, "lora_alpha": 6, "bias": "none"}
# All fields of PEFT 0.21 that plain LoRA leaves at their default.
DEFAULTS = {
    **dict.fromkeys(("use_dora", "use_rslora", "use_qalora", "lora_bias", "fan_in_fan_out"), False),
    **dict.fromkeys(("modules_to_save", "layers_to_transform", "layers_pattern", "arrow_config")),
    **dict.fromkeys(("trainable_token_indices", "target_parameters", "layer_replication")),
    **{"init_lora_weights": True, "loftq_config": {}, "rank_pattern": {}, "alpha_pattern": {}},
    **{"megatron_core": "megatron.core", "qalora_group_size": 16, "peft_version": "0.21.2"},
    **{"lora_dropout": 0.1, "inference_mode": True, "ensure_weight_tying": False},
}


def modules(pattern: str = "") -> dict[str, str]:
    """The module in PyTorch of each matrix whose path contains a text."""
    keys = {path: key for key, path in make_hub_key_map(CONFIG).parameters.items()}
    paths = {path.rpartition("/")[0] for path in random_adapters(CONFIG)}
    return {path: keys[path].removesuffix(".weight") for path in sorted(paths) if pattern in path}


def write_peft(
    folder: Path, matrices: dict[str, str], changes: dict, ranks: dict[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Write an adapter of rank 4, or of other ranks by path; return b a of each matrix."""
    folder.mkdir()
    tensors, products = {}, {}
    for path, module in matrices.items():
        rank = (ranks or {}).get(path, 4)
        factors = random_adapters(CONFIG, rank, path)
        a, b = (factors[f"{path}/{factor}"] for factor in ("lora_a", "lora_b"))
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        products[path] = b @ a
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = PLAIN | DEFAULTS | {"target_modules": list(matrices.values())} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return products


def loaded_products(folder: Path) -> dict[str, np.ndarray]:
    """The matrix that each adapter in a folder adds."""
    lora = load_adapters(folder, CONFIG)
    return {
        path: lora.scale
        * np.asarray(lora.weights[f"{path}/lora_b"])
        @ np.asarray(lora.weights[f"{path}/lora_a"])
        for path in lora.matrix_paths
    }


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for path, product in expected.items():
        np.testing.assert_allclose(found[path], product, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-LINEAR"},
        {"target_modules": ["q_proj", "v_proj", "layers.1.mlp.up_proj", "fc2", "head.0"]},
        {"target_modules": r".*\.(q_proj|v_proj|up_proj|fc2|0)"},
        {"target_modules": ["q_proj", "v_proj", "up_proj", "fc2", "head.0"], "bias": None},
    ],
    ids=["names", "all-linear", "upper case", "ends of names", "expression", "no bias field"],
)
def test_target_modules(tmp_path, changes):
    matrices = {
        path: module
        for path, module in modules().items()
        if path.endswith(("attn/q", "attn/v", "block_1/mlp/up", "vision/block_0/mlp/down", "head"))
        and path not in ("vision/block_1/mlp/up",)
    }
    products = write_peft(tmp_path / "peft", matrices, changes)
    lora = load_adapters(tmp_path / "peft", CONFIG)
    assert (lora.rank, lora.scale) == (4, 1.5)
    assert_close(loaded_products(tmp_path / "peft"), {k: 1.5 * x for k, x in products.items()})


def test_rslora(tmp_path):
    products = write_peft(tmp_path / "peft", modules("attn/q"), {"use_rslora": True})
    assert load_adapters(tmp_path / "peft", CONFIG).scale == 6 / math.sqrt(4)
    assert_close(loaded_products(tmp_path / "peft"), {k: 3 * x for k, x in products.items()})


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_pattern_and_alpha_pattern(tmp_path, rslora):
    matrices = modules("attn/q") | modules("attn/v")
    changes = {
        "use_rslora": rslora,
        "rank_pattern": {"llm.*layers.1.self_attn.q_proj": 7, "^llm.*v_proj": 2},
        "alpha_pattern": {"q_proj": 5, "layers.0.self_attn.v_proj": 9.5},
    }

    def rank(path: str) -> int:
        in_decoder = path.startswith("decoder/")
        if path == "decoder/block_1/attn/q":
            return 7
        return 2 if in_decoder and path.endswith("/v") else 4

    def alpha(path: str) -> float:
        return 5 if path.endswith("/q") else 9.5 if "block_0" in path else 6

    products = write_peft(
        tmp_path / "peft", matrices, changes, {path: rank(path) for path in matrices}
    )
    expected = {
        path: alpha(path) / (math.sqrt(rank(path)) if rslora else rank(path)) * x
        for path, x in products.items()
    }
    assert load_adapters(tmp_path / "peft", CONFIG).rank == 7
    assert_close(loaded_products(tmp_path / "peft"), expected)


def test_alpha_pattern_on_one_module(tmp_path):
    matrices = modules("decoder/block_0/attn/")
    changes = {"alpha_pattern": {matrices["decoder/block_0/attn/k"]: 12}}
    products = write_peft(tmp_path / "peft", matrices, changes)
    expected = {path: (3 if path.endswith("/k") else 1.5) * x for path, x in products.items()}
    assert_close(loaded_products(tmp_path / "peft"), expected)


def test_layers_to_transform(tmp_path):
    matrices = modules("decoder/block_1/attn/q") | modules("decoder/block_3/attn/q")
    for n, changes in enumerate(
        [
            {"layers_to_transform": [1, 3]},
            {"layers_to_transform": [1, 3], "layers_pattern": "layers"},
            {"layers_to_transform": [3, 1], "layers_pattern": ["h", "layers"]},
        ]
    ):
        write_peft(tmp_path / str(n), matrices, {"target_modules": ["q_proj"], **changes})
        assert len(load_adapters(tmp_path / str(n), CONFIG).matrix_paths) == 2


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_other_dtypes(tmp_path, dtype):
    (path,) = matrices = modules("decoder/block_1/attn/q")
    write_peft(tmp_path / "peft", matrices, {})
    keys = [f"base_model.model.{matrices[path]}.lora_{half}.weight" for half in "AB"]
    factors = random_adapters(CONFIG, 4, path)
    changes = {
        key: factors[f"{path}/{factor}"].astype(dtype)
        for key, factor in zip(keys, ("lora_a", "lora_b"), strict=True)
    }
    rewrite_shard(tmp_path / "peft/adapter_model.safetensors", changes)
    weights = load_adapters(tmp_path / "peft", CONFIG).weights
    for name, x in factors.items():
        assert np.array_equal(weights[name], x.astype(dtype).astype(np.float32))


@pytest.mark.slow
def test_same_logits_as_merging_by_hand(tmp_path, load_golden, golden):
    """With several ranks and scales, on every matrix."""
    changes = {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"k_proj": 3},
        "alpha_pattern": {"fc1": 2},
    }
    matrices = modules()
    ranks = {path: 3 if path.endswith("attn/k") else 4 for path in matrices}
    products = write_peft(tmp_path / "peft", matrices, changes, ranks)
    plain = load_golden("tiny-f32", "float32")
    flat = flatten_dict(plain.params, sep="/")
    merged = {}
    for path, x in products.items():
        fc1 = path.startswith("vision/") and path.endswith("mlp/up")
        scale = (2 if fc1 else 6) / math.sqrt(ranks[path])
        merged[path] = np.asarray(flat[path]) + np.float32(scale) * x
    ovis = load(GOLDEN / "tiny-f32", adapters=tmp_path / "peft")
    inputs = ovis.processor(
        ["What is this?"], [[open_image(golden / "images/square.png")]], max_partition=1
    )
    by_hand = forward(plain.model, unflatten_dict({**flat, **merged}, sep="/"), inputs)
    logits = forward(ovis.model, ovis.params, inputs)
    np.testing.assert_allclose(logits, by_hand, atol=1e-2)
    assert np.abs(logits - forward(plain.model, plain.params, inputs)).max() > 1.0


def test_exported_adapters_are_read_back(tmp_path):
    own = random_adapters(CONFIG)
    save_adapters(tmp_path / "own", own, CONFIG, scale=1.5)
    export_peft_adapter(GOLDEN / "tiny-f32", tmp_path / "peft", tmp_path / "own")
    lora = load_adapters(tmp_path / "peft", CONFIG)
    assert (lora.rank, lora.scale) == (4, 1.5)
    assert lora.weights.keys() == own.keys()
    assert all(np.array_equal(lora.weights[path], x) for path, x in own.items())
    # They can be exported and merged again.
    export_peft_adapter(GOLDEN / "tiny-f32", tmp_path / "again", tmp_path / "peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()


def test_merged_export(tmp_path):
    (path,) = matrices = modules("decoder/block_1/attn/q")
    products = write_peft(tmp_path / "peft", matrices, {})
    export_to_hf(GOLDEN / "tiny-f32", tmp_path / "out", merge=tmp_path / "peft")
    before, after = (
        np.asarray(load(folder).params["decoder"]["block_1"]["attn"]["q"])
        for folder in (GOLDEN / "tiny-f32", tmp_path / "out")
    )
    np.testing.assert_allclose(after, before + 1.5 * products[path], atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", "ADALORA"),
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("lora_bias", True),
        ("trainable_token_indices", [7]),
        ("target_parameters", ["up_proj.weight"]),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1, 2]),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "loftq"),
        ("a_field_of_tomorrow", {"x": 1}),
        ("target_modules", 7),
        ("target_modules", "(q_proj"),
        ("rank_pattern", {"(q_proj": 4}),
        ("r", 0),
        ("lora_alpha", "6"),
    ],
)
def test_rejected_by_name(tmp_path, field, value):
    write_peft(tmp_path / "peft", modules("decoder/block_1/attn/q"), {field: value})
    with pytest.raises(ConfigError) as caught:
        load_adapters(tmp_path / "peft", CONFIG)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/peft/adapter_config.json: {field}")
    assert repr(value) in message or repr(next(iter(value))) in message
    assert "\n" not in message


@pytest.mark.parametrize("field", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_missing_fields(tmp_path, field):
    write_peft(tmp_path / "peft", modules("decoder/block_1/attn/q"), {})
    path = tmp_path / "peft/adapter_config.json"
    config = json.loads(path.read_text())
    del config[field]
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"adapter_config.json: {field} is missing"):
        load_adapters(tmp_path / "peft", CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["v_proj"]},
        {"target_modules": r"llm\.model\.layers\.1\.self_attn\.q_pro"},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*llm.*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 11]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "h"},
    ],
)
def test_tensors_that_peft_would_ignore(tmp_path, changes):
    (module,) = modules("decoder/block_1/attn/q").values()
    write_peft(tmp_path / "peft", modules("decoder/block_1/attn/q"), changes)
    with pytest.raises(CheckpointValidationError) as caught:
        load_adapters(tmp_path / "peft", CONFIG)
    assert {(row.file, row.key, row.problem) for row in caught.value.problems} == {
        (
            "adapter_model.safetensors",
            f"base_model.model.{module}.lora_{half}.weight",
            "not a target module",
        )
        for half in "AB"
    }


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("{query}.lora_B.weight", None, "missing key"),
        ("{query}.lora_A.weight", np.zeros((5, 64), np.float32), "wrong shape"),
        ("{query}.lora_A.weight", np.zeros((4, 64), np.int8), "wrong dtype"),
        ("{query}.lora_magnitude_vector", np.zeros(64, np.float32), "unknown key"),
        (
            "base_model.model.llm.lm_head.lora_A.weight",
            np.zeros((4, 64), np.float32),
            "unknown key",
        ),
        ("base_model.model.vte.lora_embedding_A", np.zeros((4, 69), np.float32), "unknown key"),
        ("base_model.model.model.norm.weight", np.zeros(64, np.float32), "unknown key"),
    ],
)
def test_faults_of_tensors(tmp_path, key, value, problem):
    (module,) = modules("decoder/block_1/attn/q").values()
    key = key.replace("{query}", f"base_model.model.{module}")
    write_peft(tmp_path / "peft", modules("decoder/block_1/attn/q"), {})
    rewrite_shard(tmp_path / "peft/adapter_model.safetensors", {key: value})
    with pytest.raises(CheckpointValidationError) as caught:
        load_adapters(tmp_path / "peft", CONFIG)
    assert [(row.key, row.problem) for row in caught.value.problems] == [(key, problem)]


def test_pickle_instead_of_safetensors(tmp_path):
    write_peft(tmp_path / "peft", modules("decoder/block_1/attn/q"), {})
    (tmp_path / "peft/adapter_model.safetensors").rename(tmp_path / "peft/adapter_model.bin")
    with pytest.raises(CheckpointValidationError) as caught:
        load_adapters(tmp_path / "peft", CONFIG)
    (row,) = caught.value.problems
    assert (row.file, row.problem) == ("adapter_model.safetensors", "missing file")
    assert row.found.startswith("adapter_model.bin, a pickle file of PyTorch; load the adapters")


def test_adapters_given_as_a_model(tmp_path):
    base = {"base_model_name_or_path": "AIDC-AI/Ovis1.6-Gemma2-9B"}
    write_peft(tmp_path / "peft", modules("decoder/block_1/attn/q"), base)
    with pytest.raises(OvisError) as caught:
        load(tmp_path / "peft")
    assert str(caught.value) == (
        f"{tmp_path}/peft contains PEFT adapters (adapter_config.json) and no model; give the model"
        " that they were trained with (AIDC-AI/Ovis1.6-Gemma2-9B), and the folder of the adapters"
        " as --adapters or load(..., adapters=FOLDER)"
    )
    save_adapters(tmp_path / "own", random_adapters(CONFIG), CONFIG, scale=1.0)
    with pytest.raises(OvisError, match=r"own contains LoRA adapters \(adapters\.json\) and no mo"):
        load(tmp_path / "own")
