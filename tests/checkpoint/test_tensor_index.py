"""Index files, shards that are missing or wrong, and the Hub's cache."""

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from golden_copies import GOLDEN, copy_golden, rewrite_shard

from ovis_jax import presets
from ovis_jax.checkpoint.checkpoint_problems import CheckpointValidationError
from ovis_jax.checkpoint.hub import delete_from_cache
from ovis_jax.checkpoint.params import load_params
from ovis_jax.checkpoint.tensor_index import path_inside_folder, read_tensor_index
from ovis_jax.errors import CheckpointError

CONFIG = presets.tiny()
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00003.safetensors"


def edit_index(folder: Path, changes: dict[str, object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def rows_of(folder: Path):
    with pytest.raises(CheckpointValidationError) as error:
        load_params(folder, CONFIG)
    return error.value.problems


@pytest.fixture
def sharded(tmp_path) -> Path:
    return copy_golden("tiny-bf16-sharded", tmp_path / "sharded")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "a\0b"])
def test_index_that_leads_out_of_the_folder(sharded, name):
    shutil.copy(sharded / SHARD, sharded.parent / "outside.safetensors")
    edit_index(sharded, {"vte.weight": name})
    assert [(row.file, row.problem) for row in rows_of(sharded)][0] == (name, "rejected file")


def test_links_to_files_elsewhere_are_followed(sharded):
    """As in the folders of an old `huggingface-cli download --local-dir`."""
    store = sharded.parent / "store"
    store.mkdir()
    for path in sharded.iterdir():
        path.rename(store / path.name)
    for path in store.iterdir():
        (sharded / path.name).symlink_to(path)
    assert load_params(sharded, CONFIG)
    (store / SHARD).unlink()
    (row,) = rows_of(sharded)
    assert (row.file, row.problem) == (SHARD, "missing file")
    assert row.found == f"a symbolic link to {store / SHARD}, which does not exist"


def test_links_of_the_hub_cache_are_followed(sharded):
    repo = sharded.parent / "models--a--b"
    snapshot = repo / "snapshots" / "abc"
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(repo / "blobs" / str(number))
        (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", str(number)))
    assert load_params(snapshot, CONFIG)
    assert path_inside_folder(snapshot, "../../blobs/0") is None


def shared_cache(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Repositories of a cache with one shard, whose content is in the folder that they share."""
    store = folder / "hub" / "blobs" / "ab" / "abcd"
    store.parent.mkdir(parents=True)
    store.write_bytes(b"content")
    shards = []
    for name in names:
        repo = folder / "hub" / name
        for place in ("blobs", "snapshots/one", "snapshots/two"):
            (repo / place).mkdir(parents=True)
        (repo / "blobs" / "etag").symlink_to("../../blobs/ab/abcd")
        for commit in ("one", "two"):
            (repo / "snapshots" / commit / SHARD).symlink_to("../../blobs/etag")
        shards.append(repo / "snapshots" / "one" / SHARD)
    return shards


def test_shared_content_of_the_hub_cache(tmp_path):
    first, second = shared_cache(tmp_path, ("models--a--b", "models--c--d"))
    for shard in (first, second):
        assert path_inside_folder(shard.parent, SHARD) == shard
    for path in (first, second):
        delete_from_cache(path)
        assert not path.is_symlink() and not (path.parents[2] / "blobs" / "etag").is_symlink()
        assert not list(path.parents[1].glob("*/*.safetensors"))
        # The content stays as long as another repository links to it.
        assert (tmp_path / "hub/blobs/ab/abcd").exists() == (path == first)
    delete_from_cache(first)


def test_only_cached_files_are_deleted(tmp_path):
    (tmp_path / "mine").write_bytes(b"content")
    delete_from_cache(tmp_path / "mine")
    assert (tmp_path / "mine").exists()


def test_missing_shard(sharded):
    (sharded / SHARD).unlink()
    (row,) = rows_of(sharded)
    assert (row.file, row.problem) == (SHARD, "missing file")


def test_shard_whose_header_cannot_be_read(sharded):
    (sharded / SHARD).write_bytes(b"\xff" * 100)
    (row,) = rows_of(sharded)
    assert (row.file, row.problem) == (SHARD, "header length")


def test_tensor_in_two_shards(sharded):
    rewrite_shard(sharded / SHARD, {"vte.weight": np.zeros((69, 64), ml_dtypes.bfloat16)})
    (row,) = rows_of(sharded)
    assert (row.key, row.problem) == ("vte.weight", "in two files")
    assert SHARD in row.file


def test_index_that_names_the_wrong_shard_or_a_tensor_in_none(sharded):
    edit_index(sharded, {"vte.weight": SHARD, "stray": SHARD})
    rows = {(row.key, row.problem) for row in rows_of(sharded)}
    assert rows == {("vte.weight", "index differs"), ("stray", "missing tensor")}


def test_index_and_single_file(sharded):
    shutil.copy(GOLDEN / "tiny-f32" / "model.safetensors", sharded)
    (row,) = rows_of(sharded)
    assert row.problem == "two checkpoints"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_index_that_cannot_be_read(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX):
        read_tensor_index(sharded)


def test_folder_without_weights(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"neither model\.safetensors nor.*give a folder with"
    ):
        read_tensor_index(tmp_path)
    (tmp_path / "training_args.bin").touch()
    with pytest.raises(CheckpointError, match="give a folder with weights"):
        read_tensor_index(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(
        CheckpointError, match=r"; pytorch_model-00001-of-00002\.bin is a pickle fi"
    ):
        read_tensor_index(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(CheckpointError, match=rf"contains model-00001-.*; copy {INDEX}, which nam"):
        read_tensor_index(tmp_path)


def test_single_file_whose_header_cannot_be_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(CheckpointValidationError, match="truncated file"):
        read_tensor_index(tmp_path)
