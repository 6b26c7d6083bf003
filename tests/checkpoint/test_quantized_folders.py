"""Quantized folders: written by conversion and `save_params`, read, and refused."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_copies import copy_golden, read_tensors
from jax.sharding import Mesh

from ovis_jax.checkpoint.checkpoint_problems import CheckpointValidationError
from ovis_jax.checkpoint.params import load_params, save_params
from ovis_jax.config import OvisConfig
from ovis_jax.conversion.from_hf import convert_from_hf
from ovis_jax.conversion.to_hf import export_to_hf
from ovis_jax.errors import CheckpointError, OvisError
from ovis_jax.model.linear import Quantized
from ovis_jax.quantization import unpack_int4
from ovis_jax.sharding import param_shapes

SHARD = "model-00001-of-00001.safetensors"
FORMATS = {"int8": None, "int4": 64}
"""Format -> group size, which is the width of the model."""


@pytest.fixture(scope="module")
def converted(shallow_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """A quantized folder of each format; not to be changed."""
    folder = tmp_path_factory.mktemp("quantized")
    for name in FORMATS:
        convert_from_hf(shallow_checkpoint, folder / name, quantization=name)
    return {name: folder / name for name in FORMATS}


@pytest.mark.parametrize("name", FORMATS)
def test_same_bytes_from_every_writer(name, converted, shallow_checkpoint, tmp_path):
    """Conversion, loading with a quantization, loading the folder, and a mesh that pads."""
    config = OvisConfig.from_folder(shallow_checkpoint)
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    expected = (converted[name] / SHARD).read_bytes()
    for number, params in enumerate(
        (
            load_params(shallow_checkpoint, config, quantization=name),
            load_params(converted[name], config),
            load_params(converted["int8"], config, mesh=mesh) if name == "int8" else None,
        )
    ):
        if params is not None:
            save_params(tmp_path / str(number), params, config)
            assert (tmp_path / str(number) / SHARD).read_bytes() == expected
            record = json.loads((tmp_path / str(number) / "conversion.json").read_text())
            assert record["quantization"]["format"] == name


@pytest.mark.parametrize("name", FORMATS)
def test_layout_and_rounding(name, converted, shallow_checkpoint):
    config = OvisConfig.from_folder(shallow_checkpoint)
    shapes, source = (
        param_shapes(config),
        flatten_dict(load_params(shallow_checkpoint, config), sep="/"),
    )
    record = json.loads((converted[name] / "conversion.json").read_text())
    assert record["quantization"] == {
        "format": name,
        "group_size": FORMATS[name],
        "decoder_only": False,
    }
    assert record["parameters"] == sum(np.prod(shape) for shape in shapes.values())
    stored = read_tensors(converted[name])
    quantized = {path for path, x in stored.items() if x.dtype in (np.int8, np.uint8)}
    assert len(stored) == len(shapes) + len(quantized) == record["tensors"]
    assert {"decoder/embed", "visual_embedding", "visual_tokenizer/head"} < quantized
    assert not {"vision/patch", "vision/position", "decoder/final_norm"} & quantized
    assert len(quantized) == 2 * 7 + 6 + 3
    for path in quantized:
        q, scale = stored[path], stored[f"{path}/scale"]
        is_int4 = path.startswith("decoder/block") and name == "int4"
        assert (q.dtype, scale.dtype) == (np.uint8 if is_int4 else np.int8, np.float32)
        if is_int4:
            q = unpack_int4(q, 64).swapaxes(0, 1)
            assert scale.shape == q.shape[1::-1]
            scale = scale.T
        error = np.asarray(source[path]).reshape(q.shape) - q.astype(np.float32) * scale[..., None]
        # The largest number of a group is -8, so a number near 8 is rounded to 7.
        assert np.all(np.abs(error) <= np.abs(scale[..., None]) * (1.0001 if is_int4 else 0.5001))
    for path in shapes.keys() - quantized:
        assert stored[path].tobytes() == np.asarray(source[path]).tobytes()


def test_what_cannot_be_quantized_again(converted, shallow_checkpoint, tmp_path):
    folder, config = converted["int8"], OvisConfig.from_folder(shallow_checkpoint)
    with pytest.raises(OvisError, match=r"int8 is already converted and quantized to int8; give"):
        convert_from_hf(folder, tmp_path / "out", quantization="int8")
    with pytest.raises(OvisError, match=r"'int4': the matrices in .*int8 are already int8; leave"):
        load_params(folder, config, quantization="int4")
    assert load_params(folder, config, quantization="int8")
    for merge in (None, tmp_path):
        with pytest.raises(OvisError, match="is quantized to int8: the numbers from before the ro"):
            export_to_hf(folder, tmp_path / "out", merge=merge)
    with pytest.raises(OvisError, match="quantization 'int3': expected int8 or int4"):
        convert_from_hf(shallow_checkpoint, tmp_path / "out", quantization="int3")
    assert not list(tmp_path.iterdir())


def test_an_unknown_quantization_in_the_record(converted, shallow_checkpoint, tmp_path):
    config, folder = OvisConfig.from_folder(shallow_checkpoint), tmp_path / "folder"
    folder.mkdir()
    for path in converted["int4"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    record = json.loads((folder / "conversion.json").read_text())
    for change, message in (
        ({"format": "int2"}, "quantization is {'format': 'int2', 'group_size': 64, 'decoder_only'"),
        ({"group_size": 48}, "the groups of 48 inputs do not divide the 64 inputs of decoder/blo"),
        ({"group_size": 32}, "wrong shape"),
        ({"decoder_only": True}, "unknown key"),
    ):
        changed = record | {"quantization": record["quantization"] | change}
        (folder / "conversion.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError) as raised:
            load_params(folder, config)
        problems = getattr(raised.value, "problems", ())
        assert message in " ".join([str(raised.value), *(row.problem for row in problems)])


def test_params_that_are_quantized_in_part(converted, shallow_checkpoint, change_param, tmp_path):
    config = OvisConfig.from_folder(shallow_checkpoint)
    params = load_params(converted["int4"], config)
    path = "decoder/block_1/mlp/up"
    faults = {
        "array": [(path, "wrong shape"), (path, "wrong dtype"), (f"{path}/scale", "missing key")],
        "group": [(f"{path}/scale", "wrong shape")],
    }
    others = {
        "array": lambda w: w.dequantized("float32"),
        "group": lambda w: Quantized(
            w.q.reshape(128, 2, 32).swapaxes(0, 1), w.scale.repeat(2, axis=0)
        ),
    }
    for name, expected in faults.items():
        with pytest.raises(CheckpointValidationError) as raised:
            save_params(tmp_path / "out", change_param(params, path, others[name]), config)
        assert [(row.key, row.problem) for row in raised.value.problems] == expected
    assert not list(tmp_path.iterdir())


def test_a_mesh_that_cuts_a_group(converted, shallow_checkpoint):
    config = OvisConfig.from_folder(shallow_checkpoint)
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    message = (
        r"decoder/block_0/attn/o: mesh axis 'model' of size 2 would cut one of the 1 groups of an"
        r" int4 matrix; use a size that divides 1, rules that do not shard the"
    )
    with pytest.raises(OvisError, match=message):
        load_params(converted["int4"], config, mesh=mesh)


def test_dtype_of_the_other_tensors(shallow_checkpoint, tmp_path):
    """The matrices are quantized from their stored numbers."""
    config = OvisConfig.from_folder(shallow_checkpoint)
    convert_from_hf(shallow_checkpoint, tmp_path / "a", quantization="int8", dtype="bfloat16")
    params = load_params(shallow_checkpoint, config, quantization="int8")
    save_params(tmp_path / "b", params, config, dtype="bfloat16")
    assert (tmp_path / "a" / SHARD).read_bytes() == (tmp_path / "b" / SHARD).read_bytes()
    assert read_tensors(tmp_path / "a")["decoder/final_norm"].dtype == "bfloat16"


def test_no_group_divides(tmp_path):
    folder = copy_golden("tiny-f32", tmp_path / "odd")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text.replace('"intermediate_size": 128', '"intermediate_size": 100')
    )
    with pytest.raises(OvisError, match="quantization int4: decoder/block_0/mlp/down has 100 inpu"):
        load_params(folder, OvisConfig.from_folder(folder), quantization="int4")
