import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_copies import CHECKPOINTS, GOLDEN, copy_golden, read_tensors, rewrite_shard, same_bits
from jax.sharding import Mesh

from ovis_jax import presets
from ovis_jax.checkpoint.checkpoint_problems import CheckpointValidationError
from ovis_jax.checkpoint.key_map import make_hub_key_map
from ovis_jax.checkpoint.params import load_params, save_params
from ovis_jax.config import OvisConfig
from ovis_jax.errors import CheckpointError, ConfigError, OvisError
from ovis_jax.sharding import FSDP, TENSOR, TENSOR_FSDP, param_shapes, param_shardings

CONFIG = presets.tiny()
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00003.safetensors"


def flat(params) -> dict[str, Any]:
    return flatten_dict(params, sep="/")


def divisible():
    tokenizer = dataclasses.replace(CONFIG.visual_tokenizer, vocab_size=72)
    return dataclasses.replace(CONFIG, visual_tokenizer=tokenizer)


def random_params(config, dtype=np.float32):
    rng = np.random.default_rng(0)
    params = {}
    for path, shape in param_shapes(config).items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = rng.standard_normal(shape).astype(dtype)
    return params


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A converted folder of several shards whose sizes all divide."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_params(folder, random_params(divisible()), divisible(), max_shard_bytes=300_000)
    return folder


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hub_folder_loads_bit_equal(name):
    expected = read_tensors(GOLDEN / name)
    params = flat(load_params(GOLDEN / name, OvisConfig.from_folder(GOLDEN / name)))
    for key, path in make_hub_key_map(CONFIG).parameters.items():
        assert isinstance(params[path], jax.Array)
        assert same_bits(np.asarray(params[path]), expected[key])
    assert params.keys() == param_shapes(CONFIG).keys()


@pytest.mark.parametrize("dtype", ["float16", jnp.bfloat16, np.float32])
def test_cast(dtype):
    params = flat(load_params(GOLDEN / "tiny-f32", CONFIG, dtype=dtype))
    source = read_tensors(GOLDEN / "tiny-f32")["vte.weight"]
    assert {leaf.dtype for leaf in params.values()} == {np.dtype(dtype)}
    assert same_bits(np.asarray(params["visual_embedding"]), source.astype(dtype))


def test_cast_that_overflows(tmp_path):
    folder = copy_golden("tiny-f32", tmp_path / "x")
    changes = {"llm.model.norm.weight": np.full(64, 1e6, np.float32)}
    rewrite_shard(folder / "model.safetensors", changes)
    with pytest.raises(
        CheckpointError, match=r"llm\.model\.norm\.weight: contains numbers too large"
    ):
        load_params(folder, CONFIG, dtype="float16")


def test_unsupported_dtypes(tmp_path):
    with pytest.raises(OvisError, match="expected float32, float16 or bfloat16"):
        load_params(GOLDEN / "tiny-f32", CONFIG, dtype="int8")
    folder = copy_golden("tiny-f32", tmp_path / "x")
    path = folder / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"torch_dtype": "float32"', '"torch_dtype": "float64"'))
    with pytest.raises(ConfigError, match="torch_dtype: dtype 'float64'"):
        load_params(folder, CONFIG)
    path.write_text(text.replace('"torch_dtype": "float32"', '"torch_dtype": null'))
    with pytest.raises(ConfigError, match="torch_dtype is None"):
        load_params(folder, CONFIG)
    assert load_params(folder, CONFIG, dtype="float32")


def test_stored_dtype_that_differs_from_the_config(tmp_path):
    folder = copy_golden("tiny-f32", tmp_path / "x")
    rewrite_shard(folder / "model.safetensors", {"vte.weight": np.zeros((69, 64), np.float16)})
    with pytest.raises(CheckpointValidationError, match="or give the dtype to cast to") as error:
        load_params(folder, CONFIG)
    (row,) = error.value.problems
    assert (row.problem, row.expected, row.found) == ("wrong dtype", "F32", "F16")
    assert load_params(folder, CONFIG, dtype="bfloat16")


def test_config_of_another_model():
    wider = dataclasses.replace(CONFIG.decoder, mlp_width=256)
    with pytest.raises(CheckpointValidationError) as error:
        load_params(GOLDEN / "tiny-f32", dataclasses.replace(CONFIG, decoder=wider))
    assert {row.problem for row in error.value.problems} == {"wrong shape"}
    assert len(error.value.problems) == 3 * CONFIG.decoder.depth


@pytest.mark.parametrize("rules", [TENSOR, FSDP, TENSOR_FSDP], ids=["tensor", "fsdp", "both"])
def test_each_device_has_its_own_slice(saved, rules):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))
    unsharded = flat(load_params(saved, divisible()))
    params = flat(load_params(saved, divisible(), mesh=mesh, rules=rules))
    shardings = param_shardings(divisible(), mesh, rules)
    assert params.keys() == shardings.keys()
    for path, array in params.items():
        assert array.sharding == shardings[path]
        expected = np.asarray(unsharded[path])
        pads = [(0, a - b) for a, b in zip(array.shape, expected.shape, strict=True)]
        expected = np.pad(expected, pads)
        for shard in array.addressable_shards:
            assert shard.data.shape == shardings[path].shard_shape(expected.shape)
            assert same_bits(np.asarray(shard.data), np.ascontiguousarray(expected[shard.index]))


def test_hub_folder_on_a_mesh_with_a_cast():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(8), ("data",))
    params = flat(load_params(GOLDEN / "tiny-f32", CONFIG, dtype="bfloat16", mesh=mesh, rules=FSDP))
    source = read_tensors(GOLDEN / "tiny-f32")["vte.weight"].astype(ml_dtypes.bfloat16)
    assert len(params["visual_embedding"].addressable_shards) == 8
    assert same_bits(np.asarray(params["visual_embedding"]), source)


@pytest.mark.parametrize("devices", [0, 1, 8])
def test_on_read_reports_every_byte_once(devices):
    """Whether a tensor is sharded, replicated, or on one device."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",)) if devices else None
    slices: dict[str, list[int]] = {}
    load_params(
        GOLDEN / "tiny-bf16-sharded",
        CONFIG,
        dtype="float32",
        mesh=mesh,
        rules=FSDP,
        on_read=lambda key, size: slices.setdefault(key, []).append(size),
    )
    stored = read_tensors(GOLDEN / "tiny-bf16-sharded")
    assert {key: sum(sizes) for key, sizes in slices.items()} == {
        key: stored[key].nbytes for key in make_hub_key_map(CONFIG).parameters
    }
    assert max(map(len, slices.values())) == max(devices, 1)


def test_mesh_that_does_not_divide():
    mesh = Mesh(np.array(jax.devices()[:4]), ("model",))
    with pytest.raises(OvisError, match="letter K has size 2"):
        load_params(GOLDEN / "tiny-f32", CONFIG, mesh=mesh)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_round_trip(tmp_path, dtype):
    params = random_params(CONFIG, dtype)
    params["decoder"]["embed"] = jnp.asarray(params["decoder"]["embed"])
    folder = tmp_path / "saved"
    save_params(folder, params, CONFIG, files={"note.txt": b"note"}, max_shard_bytes=100_000)
    assert OvisConfig.from_folder(folder) == CONFIG
    assert (folder / "note.txt").read_bytes() == b"note"
    assert len(list(folder.glob("*.safetensors"))) > 3
    loaded = flat(load_params(folder, OvisConfig.from_folder(folder)))
    for path, leaf in flat(params).items():
        assert same_bits(np.asarray(loaded[path]), np.asarray(leaf))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_sharded_parameters_are_saved_with_a_cast(saved, tmp_path):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))
    params = load_params(saved, divisible(), mesh=mesh, rules=TENSOR_FSDP)
    save_params(tmp_path / "x", params, divisible(), dtype="bfloat16")
    again, unsharded = flat(load_params(tmp_path / "x", divisible())), flat(params)
    for path, leaf in again.items():
        expected = np.asarray(unsharded[path])[: len(leaf)]  # without the padding of the mesh
        assert same_bits(np.asarray(leaf), expected.astype(ml_dtypes.bfloat16))


def test_extra_rows_that_are_not_padding(tmp_path):
    params = random_params(divisible())  # 72 rows and no zeros; the config has 69
    with pytest.raises(CheckpointValidationError) as error:
        save_params(tmp_path / "x", params, CONFIG)
    assert {(row.key, row.problem) for row in error.value.problems} == {
        (path, "wrong shape") for path in params_of_the_visual_vocabulary()
    }


def params_of_the_visual_vocabulary():
    return {"visual_embedding"} | {
        f"visual_tokenizer/{name}" for name in ("head", "norm/scale", "norm/bias")
    }


def test_parameters_of_another_config(tmp_path):
    params = random_params(CONFIG)
    del params["visual_embedding"]
    params["stray"] = np.zeros(3, np.float32)
    params["decoder"]["final_norm"] = np.zeros(65, np.float32)
    params["decoder"]["embed"] = params["decoder"]["embed"].astype(np.float16)
    params["decoder"]["block_0"]["attn"]["q"] = "q"
    with pytest.raises(CheckpointValidationError) as error:
        save_params(tmp_path / "x", params, CONFIG)
    assert {(row.key, row.problem) for row in error.value.problems} == {
        ("visual_embedding", "missing key"),
        ("stray", "unknown key"),
        ("decoder/final_norm", "wrong shape"),
        ("decoder/embed", "wrong dtype"),
        ("decoder/block_0/attn/q", "not an array"),
    }
    assert not list(tmp_path.iterdir())


def test_parameters_of_an_unsupported_dtype(tmp_path):
    with pytest.raises(CheckpointValidationError) as error:
        save_params(tmp_path / "x", random_params(CONFIG, np.float64), CONFIG)
    rows = {(row.problem, row.expected, row.found) for row in error.value.problems}
    assert rows == {("wrong dtype", "one of F32, F16, BF16", "float64")}


def test_folder_that_is_not_empty(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").touch()
    with pytest.raises(OvisError, match="exists and is not an empty folder"):
        save_params(tmp_path / "x", random_params(CONFIG), CONFIG)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["mine"]


def test_full_disk_is_detected_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="are free; make room in"):
        save_params(tmp_path / "x", random_params(CONFIG), CONFIG)
    assert not list(tmp_path.iterdir())


def test_converted_folder_of_another_format(saved, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(saved, folder)
    (folder / "conversion.json").write_text('{"format": 2}')
    with pytest.raises(CheckpointError, match="format is 2, expected 1"):
        load_params(folder, divisible())
