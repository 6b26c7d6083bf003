"""Checkpoints that AutoGPTQ quantized: read without loss, compared with goldens, and refused."""

import copy
import json
import math
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_copies import read_files, read_tensors
from measured import record
from safetensors.numpy import load_file, save_file

from ovis_jax import presets
from ovis_jax.checkpoint.checkpoint_problems import CheckpointValidationError
from ovis_jax.checkpoint.gptq import make_gptq_key_map, repack_gptq
from ovis_jax.checkpoint.key_map import make_hub_key_map, unused_tensor_shapes
from ovis_jax.checkpoint.params import load_params, save_params
from ovis_jax.config import OvisConfig
from ovis_jax.conversion.from_hf import convert_from_hf
from ovis_jax.conversion.to_hf import export_to_hf
from ovis_jax.errors import CheckpointError, ConfigError, OvisError
from ovis_jax.loading import load
from ovis_jax.quantization import Quantization, pack_int4, quantized_matrices, unpack_int4
from ovis_jax.sharding import axis_letter_sizes, param_shapes, shape_from_axes
from ovis_jax.verify_goldens import GoldenFile, compare_with_golden

GOLDEN = Path(__file__).parents[1] / "golden-gptq"
SOURCE, WEIGHTS = GOLDEN / "tiny-gptq-int4", "gptq_model-4bit-32g.safetensors"
CASES = sorted((GOLDEN / "cases/tiny-gptq-int4").glob("*.npz"))
CONFIG, UP = presets.tiny(), "llm.model.layers.1.mlp.up_proj"


@pytest.fixture
def copied(tmp_path) -> Path:
    """A copy of the checkpoint, to be changed."""
    return shutil.copytree(SOURCE, tmp_path / "copied", copy_function=shutil.copyfile)


def change_tensors(folder: Path, changes: dict[str, np.ndarray | None]) -> None:
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({key: x for key, x in tensors.items() if x is not None}, folder / WEIGHTS)


def change_settings(folder: Path, changes: dict[str, object], *files: str) -> None:
    """Change settings of GPTQ in one or both of the files that state them; None removes one."""
    for name in files or ("config.json", "quantize_config.json"):
        content = json.loads((folder / name).read_text())
        settings = content["quantization_config"] if name == "config.json" else content
        settings |= changes
        for key in [key for key, value in settings.items() if value is None]:
            del settings[key]
        (folder / name).write_text(json.dumps(content))


@pytest.mark.slow
@pytest.mark.optimized
def test_golden_results(tmp_path):
    """The converted folder gives the results of the original code with dequantized weights."""
    convert_from_hf(SOURCE, tmp_path / "converted")
    ovis = load(tmp_path / "converted", dtype="float32")
    assert len(CASES) == 3
    for path in CASES:
        stages = compare_with_golden(ovis, GoldenFile(path))
        for stage in stages:
            record(f"golden GPTQ: {stage.name}", stage.difference, stage.tolerance)
        assert not [stage for stage in stages if not stage.passed]
        assert {"logits", "24 greedy tokens"} <= {stage.name for stage in stages}


def test_nothing_is_rounded(tmp_path):
    """Neither by loading nor by conversion, which writes the bytes that `save_params` writes."""
    written = convert_from_hf(SOURCE, tmp_path / "converted")
    params = load_params(SOURCE, CONFIG)
    save_params(tmp_path / "saved", params, CONFIG)
    name = "model-00001-of-00001.safetensors"
    converted = read_files(tmp_path / "converted")
    assert converted[name] == read_files(tmp_path / "saved")[name]
    source, flat = read_tensors(SOURCE), flatten_dict(params, sep="/")
    quantized = 0
    for key, path in make_hub_key_map(CONFIG).parameters.items():
        if key in source:
            assert np.asarray(flat[path]).tobytes() == source[key].tobytes()
            assert flat[path].dtype == ml_dtypes.bfloat16
            continue
        module, quantized = key.removesuffix(".weight"), quantized + 1
        qweight, scales = source[f"{module}.qweight"].view(np.uint32), source[f"{module}.scales"]
        codes = np.stack([qweight >> 4 * n & 15 for n in range(8)], axis=1)  # [i / 8, 8, o]
        codes = codes.reshape(-1, qweight.shape[1]).astype(np.float32)
        groups = source[f"{module}.g_idx"]
        expected = scales.astype(np.float32)[groups] * (codes - 8)
        assert np.array_equal(np.asarray(flat[path].dequantized(np.float32)), expected.T)
    assert quantized == 28
    assert written["source_keys"] == 211
    assert len(written["not_used"]) == 13 + 1 + 28 + 2 * 28
    assert written["quantization"] == {"format": "int4", "group_size": 32, "decoder_only": True}
    config = json.loads(converted["config.json"])
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"
    assert "quantize_config.json" not in converted


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_either_16_bit_dtype(copied, dtype, tmp_path):
    """For the tensors that are not quantized and for the scales, whatever config.json states."""
    tensors = load_file(copied / WEIGHTS)
    floats = {key: x.astype(dtype) for key, x in tensors.items() if x.dtype != np.int32}
    change_tensors(copied, floats)
    params = flatten_dict(load_params(copied, CONFIG), sep="/")
    assert params["decoder/embed"].dtype == params["visual_tokenizer/head"].dtype == dtype
    scale = np.asarray(params["decoder/block_1/mlp/up"].scale)
    assert scale.dtype == np.float32
    assert np.array_equal(scale, floats[f"{UP}.scales"].astype(np.float32))
    assert convert_from_hf(copied, tmp_path / "out")["dtype"] == np.dtype(dtype).name
    assert load_params(tmp_path / "out", CONFIG)["decoder"]["embed"].dtype == dtype


def test_order_of_the_numbers():
    codes = np.arange(32).reshape(2, 16) % 16  # [o, i]
    words = (codes.reshape(2, 2, 8) << 4 * np.arange(8)).sum(-1).T  # [i / 8, o]
    packed = repack_gptq(words.astype(np.uint32).view(np.int32))
    assert (packed.dtype, packed.shape) == (np.uint8, (2, 8))
    assert np.array_equal(pack_int4(unpack_int4(packed, 8)), packed)
    q = unpack_int4(packed, 8).astype(int).swapaxes(0, 1)
    assert np.array_equal(q.reshape(2, 16), codes - 8)


def test_size_of_the_published_9b():
    """With 16 bits per number that is not quantized, the output matrix, and the unused tensors."""
    config = presets.ovis1_6_gemma2_9b()
    keys = make_gptq_key_map(config, Quantization("int4", 128, decoder_only=True))
    assert sum(key.endswith(".bias") for key in keys.unused if key.startswith("llm")) == 42 * 7
    assert keys.tensors is not None
    item_bytes = {"I32": 4, None: 2, "F32 F16 BF16": 2}
    total = sum(
        item_bytes[dtype] * math.prod(shape_from_axes(axes, axis_letter_sizes(config, name)))
        for name, (axes, dtype) in keys.tensors.items()
    )
    matrices = quantized_matrices(config, Quantization("int4", 128, decoder_only=True))
    total += 2 * sum(rows for rows, _ in matrices.values())
    total += 2 * sum(map(math.prod, unused_tensor_shapes(config).values()))
    total += 2 * math.prod(param_shapes(config)["decoder/embed"])
    assert round(total / 1e9, 2) == 9.94


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "bits is 8, expected 4; give a checkpoint with this setting, or one that is"),
        ({"sym": False}, "sym is False, expected True"),
        ({"desc_act": True}, "desc_act is True, expected False"),
        ({"group_size": -1}, "group_size is -1, expected a multiple of 8"),
        ({"group_size": 36}, "group_size is 36, expected a multiple of 8"),
        ({"checkpoint_format": "gptq_v2"}, "checkpoint_format is 'gptq_v2', expected 'gptq'"),
        ({"is_marlin_format": True}, "is_marlin_format is True, expected False"),
        ({"bits": None}, "bits is missing; the field is required"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "quantize_config.json"])
def test_unsupported_settings_are_named(copied, file, changes, message):
    change_settings(copied, changes, file)
    where = "config.json: quantization_config" if file == "config.json" else file
    with pytest.raises(ConfigError) as raised:
        load(copied)
    assert f"{where}: {message}" in str(raised.value)


def test_settings_in_one_file_or_in_two(copied):
    change_settings(copied, {"group_size": 16}, "quantize_config.json")
    with pytest.raises(ConfigError, match=r"group_size is 16 in .*quantize_config.json and 32 in "):
        load_params(copied, CONFIG)
    (copied / "quantize_config.json").unlink()
    assert load_params(copied, CONFIG)
    config = json.loads((copied / "config.json").read_text())
    without = {key: value for key, value in config.items() if key != "quantization_config"}
    (copied / "config.json").write_text(json.dumps(without))
    with pytest.raises(CheckpointError, match=f"it contains {WEIGHTS}; copy quantize_config.json"):
        load_params(copied, CONFIG)
    shutil.copyfile(SOURCE / "quantize_config.json", copied / "quantize_config.json")
    assert load_params(copied, OvisConfig.from_folder(copied))
    change_settings(copied, {"group_size": 64}, "quantize_config.json")
    with pytest.raises(CheckpointError, match=r"neither gptq_model-4bit-64g.safetensors nor model"):
        load_params(copied, CONFIG)
    change_settings(copied, {"group_size": 24}, "quantize_config.json")
    with pytest.raises(CheckpointError, match="groups of 24 inputs do not divide the 64 inputs of"):
        load_params(copied, CONFIG)


def test_unsupported_numbers_are_named(copied, tmp_path):
    tensors = copy.deepcopy(load_file(copied / WEIGHTS))
    tensors[f"{UP}.qzeros"][1, 3] = 0x77777778
    tensors[f"{UP}.g_idx"][[0, 40]] = tensors[f"{UP}.g_idx"][[40, 0]]
    tensors[f"{UP}.bias"][5] = 0.5
    change_tensors(copied, tensors)
    for read in (
        lambda: load_params(copied, CONFIG),
        lambda: convert_from_hf(copied, tmp_path / "x"),
    ):
        with pytest.raises(CheckpointValidationError) as raised:
            read()
        assert "quantized with sym true and desc_act false, or one that is not" in str(raised.value)
        assert [(row.key, row.found) for row in raised.value.problems] == [
            (f"{UP}.qzeros", "0x77777778 at [1, 3]"),
            (f"{UP}.g_idx", "1 at [0]"),
            (f"{UP}.bias", "0.5 at [5]"),
        ]
    assert [path.name for path in tmp_path.iterdir()] == ["copied"]


def test_every_key_is_accounted_for(copied):
    change_tensors(
        copied,
        {
            f"{UP}.qzeros": None,
            f"{UP}.bias": None,  # may be absent
            f"{UP}.qweight": np.zeros((8, 120), np.int32),
            f"{UP}.scales": np.zeros((2, 128), np.float64),
            f"{UP}.weight": np.zeros((128, 64), np.float16),
            "llm.model.norm.weight": np.zeros(64, np.float16),
        },
    )
    with pytest.raises(CheckpointValidationError) as raised:
        load_params(copied, CONFIG)
    assert {(row.key, row.problem, row.expected) for row in raised.value.problems} == {
        (f"{UP}.qzeros", "missing key", "[2, 16] for decoder/block_1/mlp/up/qzeros"),
        (f"{UP}.qweight", "wrong shape", "[8, 128] '8 F', F = 128"),
        (f"{UP}.scales", "wrong dtype", "one of F32, F16, BF16"),
        (f"{UP}.weight", "unknown key", "no such tensor"),
        ("llm.model.norm.weight", "wrong dtype", "BF16"),
    }


def test_what_cannot_be_done(copied, tmp_path):
    for name in ("int8", "int4"):
        with pytest.raises(OvisError, match="are already int4 in groups of 32; leave quantization"):
            convert_from_hf(SOURCE, tmp_path / "out", quantization=name)
    with pytest.raises(OvisError, match=r"is quantized to int4 in groups of 32: .* or keep the ad"):
        export_to_hf(SOURCE, tmp_path / "out", merge=tmp_path)
    output = "llm.lm_head.weight"
    change_tensors(copied, {output: -load_file(copied / WEIGHTS)[output]})
    with pytest.raises(CheckpointValidationError, match="set disable_tie_weight to true in config"):
        load_params(copied, CONFIG)
    assert os.listdir(tmp_path) == ["copied"]
