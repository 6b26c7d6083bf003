"""LoRA adapters: saving and loading them, loading a model with them, and every fault."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_copies import GOLDEN, rewrite_shard, same_bits
from jax.sharding import Mesh, PartitionSpec
from random_adapters import random_adapters
from shallow import shallow_config

from ovis_jax import presets
from ovis_jax.checkpoint import output_dirs
from ovis_jax.checkpoint.adapters import load_adapters, save_adapters
from ovis_jax.checkpoint.checkpoint_problems import CheckpointValidationError
from ovis_jax.checkpoint.params import save_params
from ovis_jax.errors import CheckpointError, ConfigError, OvisError
from ovis_jax.inference.generate import generate
from ovis_jax.inputs.batch import Inputs
from ovis_jax.inputs.open_image import open_image
from ovis_jax.loading import load
from ovis_jax.model.linear import LowRank
from ovis_jax.model.lora import attach_adapters, init_adapters, merge_adapters
from ovis_jax.model.ovis import Ovis, forward
from ovis_jax.sharding import TENSOR_FSDP, adapter_axes, supports_adapter

CONFIG = presets.tiny()
QUERY = "decoder/block_1/attn/q"


@pytest.fixture
def folder(tmp_path):
    """Adapters of rank 4 on every matrix of the tiny model."""
    save_adapters(tmp_path / "lora", random_adapters(CONFIG), CONFIG, scale=2.0)
    return tmp_path / "lora"


def rows_of(caught) -> set[tuple[str, str]]:
    return {(row.key, row.problem) for row in caught.value.problems}


def edit_record(folder, **changes) -> None:
    path = folder / "adapters.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip_is_bit_equal(folder):
    adapters = random_adapters(CONFIG)
    loaded = load_adapters(folder, CONFIG)
    assert (loaded.rank, loaded.scale) == (4, 2.0)
    assert loaded.weights.keys() == adapters.keys()
    assert all(same_bits(np.asarray(loaded.weights[path]), x) for path, x in adapters.items())
    # 4 matrices and 2 in each SigLIP block, the head, 4 and 3 in each Gemma2 block.
    count = 6 * CONFIG.vision.depth + 1 + 7 * CONFIG.decoder.depth
    assert len(loaded.matrix_paths) == count == len(adapters) / 2
    assert [path.name for path in folder.parent.iterdir()] == ["lora"]
    assert {path.name for path in folder.iterdir()} == {"adapters.json", "adapters.safetensors"}


def test_initialized_adapters_can_be_saved(load_golden, tmp_path):
    params = load_golden("tiny-f32", "float32").params
    adapters = init_adapters(params, jax.random.key(0), rank=3)
    save_adapters(tmp_path / "lora", adapters, CONFIG, scale=0.5)
    loaded = load_adapters(tmp_path / "lora", CONFIG)
    assert (loaded.rank, loaded.scale) == (3, 0.5)
    assert loaded.weights.keys() == adapters.keys()
    assert all(np.array_equal(loaded.weights[path], x) for path, x in adapters.items())


def test_embedding_tables_have_no_adapter(load_golden):
    params = load_golden("tiny-f32", "float32").params
    adapters = init_adapters(params, jax.random.key(0), rank=2, target_modules=".*")
    assert adapters.keys() == adapter_axes(CONFIG).keys()
    for path in ("decoder/embed", "visual_embedding", "vision/position", "vision/patch"):
        assert f"{path}/lora_a" not in adapters and not supports_adapter(path)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_load_attaches_adapters(folder, load_golden, dtype):
    ovis = load(GOLDEN / "tiny-f32", dtype=dtype, adapters=folder)
    plain = load_golden("tiny-f32", dtype or "float32")
    stored = np.dtype(dtype or "float32")
    rounded = {path: jnp.asarray(x, stored) for path, x in random_adapters(CONFIG).items()}
    expected = flatten_dict(attach_adapters(plain.params, rounded, 2.0), sep="/")
    found = flatten_dict(ovis.params, sep="/")
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert isinstance(leaf, LowRank) == supports_adapter(path)
        for x, y in zip(jax.tree.leaves(leaf), jax.tree.leaves(expected[path]), strict=True):
            assert x.dtype == stored and np.array_equal(x, y), path


@pytest.mark.exhaustive
def test_attached_adapters_equal_merged_ones(folder, load_golden, golden):
    ovis, plain = load(GOLDEN / "tiny-f32", adapters=folder), load_golden("tiny-f32", "float32")
    image = open_image(golden / "images/square.png")
    inputs = ovis.processor(["What is this?"], [[image]], max_partition=1)
    logits = forward(ovis.model, ovis.params, inputs)
    merged = merge_adapters(ovis.params)
    np.testing.assert_allclose(logits, forward(ovis.model, merged, inputs), atol=1e-2)
    assert np.abs(logits - forward(plain.model, plain.params, inputs)).max() > 1.0
    out = generate(ovis.model, ovis.params, inputs, max_new_tokens=6, eos_ids=())
    assert out.tokens.shape == (1, 6)
    assert (
        out.tokens.tolist()
        == generate(ovis.model, merged, inputs, max_new_tokens=6, eos_ids=()).tokens.tolist()
    )


@pytest.mark.slow
def test_on_a_mesh(tmp_path):
    """A model whose sizes divide, untied so that the output matrix has an adapter too."""
    shallow = shallow_config()
    tokenizer = dataclasses.replace(shallow.visual_tokenizer, vocab_size=72)
    decoder = dataclasses.replace(shallow.decoder, tie_embeddings=False)
    config = dataclasses.replace(shallow, visual_tokenizer=tokenizer, decoder=decoder)
    params = jax.jit(Ovis(config).init)(jax.random.key(0))
    adapters = random_adapters(config)
    assert "decoder/unembed/lora_a" in adapters
    save_adapters(tmp_path / "lora", adapters, config, scale=2.0)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    placed = load_adapters(tmp_path / "lora", config, mesh=mesh).weights
    assert placed[f"{QUERY}/lora_a"].sharding.spec == PartitionSpec(None, None)
    assert placed[f"{QUERY}/lora_b"].sharding.spec == PartitionSpec("model", None)
    assert placed["decoder/block_1/mlp/down/lora_a"].sharding.spec == PartitionSpec(None, "model")
    both = load_adapters(tmp_path / "lora", config, mesh=mesh, rules=TENSOR_FSDP).weights
    assert both[f"{QUERY}/lora_a"].sharding.spec == PartitionSpec(None, "data")

    save_params(tmp_path / "model", params, config, files=processor_files())
    ovis = load(tmp_path / "model", mesh=mesh, adapters=tmp_path / "lora")
    factor = ovis.params["decoder"]["block_1"]["attn"]["q"].b
    assert factor.sharding.spec == PartitionSpec("model", None)
    tokens = np.random.default_rng(0).integers(108, 600, (4, 30)).astype(np.int32)
    tokens[:, 1:10] = -300
    positions = np.tile(np.arange(30, dtype=np.int32), (4, 1))
    pixels = np.random.default_rng(1).normal(size=(4, 70, 70, 3)).astype(np.float32)
    inputs = Inputs(tokens, positions, pixels)
    unsharded = attach_adapters(params, jax.tree.map(jnp.asarray, adapters), 2.0)
    expected = generate(Ovis(config), unsharded, inputs, max_new_tokens=5, eos_ids=())
    out = generate(ovis.model, ovis.params, inputs, max_new_tokens=5, eos_ids=())
    assert out.tokens.tolist() == expected.tokens.tolist()
    np.testing.assert_allclose(out.log_probs, expected.log_probs, atol=1e-4)


def processor_files() -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in (GOLDEN / "tiny-f32").iterdir()
        if path.name.startswith(("tokenizer", "preprocessor", "special"))
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({f"{QUERY}/lora_b": None}, {(f"{QUERY}/lora_b", "missing key")}),
        ({f"{QUERY}/lora_a": np.zeros((4, 65), np.float32)}, {(f"{QUERY}/lora_a", "wrong shape")}),
        ({f"{QUERY}/lora_b": np.zeros((64, 3), np.float32)}, {(f"{QUERY}/lora_b", "wrong shape")}),
        ({f"{QUERY}/lora_a": np.zeros((4, 64), np.float16)}, {(f"{QUERY}/lora_a", "wrong dtype")}),
        (
            {"decoder/embed/lora_a": np.zeros((4, 64), np.float32), "x": np.zeros(3, np.float32)},
            {("decoder/embed/lora_a", "unknown key"), ("x", "unknown key")},
        ),
        (
            {f"{QUERY}/lora_b": None, "vision/block_0/mlp/up/lora_a": np.zeros(4, np.float32)},
            {(f"{QUERY}/lora_b", "missing key"), ("vision/block_0/mlp/up/lora_a", "wrong shape")},
        ),
    ],
)
def test_every_fault_has_a_row_for_files_and_arrays(folder, tmp_path, changes, expected):
    rewrite_shard(folder / "adapters.safetensors", changes)
    with pytest.raises(CheckpointValidationError) as caught:
        load_adapters(folder, CONFIG)
    assert rows_of(caught) == expected
    adapters = {path: x for path, x in (random_adapters(CONFIG) | changes).items() if x is not None}
    with pytest.raises(CheckpointValidationError) as caught:
        save_adapters(tmp_path / "again", adapters, CONFIG, scale=2.0)
    assert rows_of(caught) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_a_row_names_the_letter(folder):
    changes = {f"{QUERY}/lora_a": np.zeros((4, 65), np.float32), f"{QUERY}/lora_b": None}
    rewrite_shard(folder / "adapters.safetensors", changes)
    with pytest.raises(CheckpointValidationError) as caught:
        load_adapters(folder, CONFIG)
    message = str(caught.value)
    assert f"{folder}: 2 problems" in message
    assert (
        f"{QUERY}/lora_a: wrong shape: expected [4, 64] 'R D', D = 64, found [4, 65], D = 65"
        in (message)
    )
    assert (
        f"{QUERY}/lora_b: missing key: expected [64, 4] '(N H) R', as for {QUERY}/lora_a" in message
    )


def test_rank_that_differs_from_the_record(folder):
    edit_record(folder, rank=8)
    with pytest.raises(
        CheckpointValidationError, match=r"R = 8, found \[4, \d+\], R = 4"
    ) as caught:
        load_adapters(folder, CONFIG)
    assert rows_of(caught) == {(path, "wrong shape") for path in random_adapters(CONFIG)}


def test_checkpoint_of_another_config(folder, tmp_path):
    decoder = dataclasses.replace(CONFIG.decoder, num_kv_heads=4, rope_theta=5e5)
    other = dataclasses.replace(CONFIG, decoder=decoder)
    with pytest.raises(CheckpointValidationError) as caught:
        load_adapters(folder, other)
    message = str(caught.value)
    assert "2 problems; give the checkpoint that they were trained with" in message
    row = "adapters.json: config: llm_config.num_key_value_heads: another config: expected 4"
    assert f"{row}, found 2" in message
    assert "llm_config.rope_theta: another config: expected 500000.0, found 10000.0" in message
    with pytest.raises(CheckpointValidationError) as caught:
        save_adapters(tmp_path / "again", random_adapters(CONFIG), other, scale=1.0)
    assert ("decoder/block_0/attn/k/lora_b", "wrong shape") in rows_of(caught)


def test_config_with_other_ids_and_lengths(folder):
    other = dataclasses.replace(CONFIG, multimodal_max_length=99, eos_ids=(7,), pad_id=5)
    assert load_adapters(folder, other).rank == 4


def test_folders_without_adapters(folder, tmp_path):
    for path in (tmp_path / "nowhere", folder / "adapters.json"):
        with pytest.raises(OvisError, match=r"is not a folder; give a folder that ovis-j"):
            load_adapters(path, CONFIG)
    with pytest.raises(OvisError, match=r"it has no adapters\.json and no adapter_c"):
        load(GOLDEN / "tiny-f32", adapters=GOLDEN / "tiny-f32")
    edit_record(folder, format=3)
    with pytest.raises(CheckpointError, match=r"format is 3, expected 2"):
        load_adapters(folder, CONFIG)
    edit_record(folder, format=2, scale="2")
    with pytest.raises(ConfigError, match=r"scale is '2', expected a number above 0"):
        load_adapters(folder, CONFIG)
    edit_record(folder, scale=2.0)
    (folder / "adapters.safetensors").write_bytes(b"\0" * 4)
    with pytest.raises(CheckpointValidationError, match="truncated file"):
        load_adapters(folder, CONFIG)
    (folder / "adapters.safetensors").unlink()
    with pytest.raises(
        CheckpointValidationError, match="missing file: expected a file, found no file"
    ):
        load_adapters(folder, CONFIG)


def test_invalid_adapters_are_not_saved(tmp_path, monkeypatch):
    adapters = random_adapters(CONFIG)
    for scale in (0.0, float("nan")):
        with pytest.raises(OvisError, match=f"scale is {scale}, expected a number above 0"):
            save_adapters(tmp_path / "lora", adapters, CONFIG, scale=scale)
    with pytest.raises(CheckpointValidationError, match="no adapters: expected two tensors"):
        save_adapters(tmp_path / "lora", {}, CONFIG, scale=1.0)
    with pytest.raises(
        CheckpointValidationError, match="not an array: expected an array, found list"
    ):
        save_adapters(tmp_path / "lora", {**adapters, f"{QUERY}/lora_a": [1.0]}, CONFIG, scale=1.0)
    monkeypatch.setattr(output_dirs.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="GB are needed"):
        save_adapters(tmp_path / "lora", adapters, CONFIG, scale=1.0)
    assert not list(tmp_path.iterdir())


def test_failed_save_changes_nothing(folder, monkeypatch):
    before = (folder / "adapters.safetensors").read_bytes()
    with pytest.raises(OvisError, match="exists and is not an empty folder"):
        save_adapters(folder, random_adapters(CONFIG), CONFIG, scale=1.0)
    monkeypatch.setattr("ovis_jax.checkpoint.adapters.write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapters(folder.with_name("new"), random_adapters(CONFIG), CONFIG, scale=1.0)
    assert (folder / "adapters.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["lora"]
