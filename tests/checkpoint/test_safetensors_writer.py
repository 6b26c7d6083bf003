"""Safetensors files as they are written: valid, aligned, and complete or absent."""

import jax
import ml_dtypes
import numpy as np
import pytest
from golden_copies import DTYPES, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from ovis_jax.checkpoint.safetensors_reader import map_file, read_header, view_tensor
from ovis_jax.checkpoint.safetensors_writer import plan_shards, save_arrays, write_safetensors

ARRAYS = st.dictionaries(
    st.text(min_size=1).filter(lambda key: key != "__metadata__" and key.isprintable()),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
    max_size=6,
)


@pytest.mark.slow
@given(layout=ARRAYS, seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_the_safetensors_package_reads_written_files(tmp_path_factory, layout, seed):
    rng = np.random.default_rng(seed)
    arrays = {
        key: rng.standard_normal(shape).astype(DTYPES[dtype])
        for key, (dtype, shape) in layout.items()
    }
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    write_safetensors(
        path,
        {key: (dtype, tuple(shape)) for key, (dtype, shape) in layout.items()},
        lambda key: [memoryview(arrays[key].tobytes())],
    )
    loaded = load_file(path)
    assert not read_header(path).problems
    assert loaded.keys() == arrays.keys()
    assert all(same_bits(loaded[key], arrays[key]) for key in arrays)


def test_tensors_are_aligned_and_mapped_by_a_cpu_device(tmp_path):
    path = tmp_path / "x.safetensors"
    layout = {"odd": ("BF16", (3,)), "a": ("F32", (16,)), "b": ("BF16", (64, 64))}
    arrays = {key: np.ones(shape, DTYPES[dtype]) for key, (dtype, shape) in layout.items()}
    write_safetensors(path, layout, lambda key: [memoryview(arrays[key].tobytes())])
    tensors = {info.key: info for info in read_header(path).tensors}
    assert [tensors[key].start % 64 for key in ("a", "b", "odd")] == [0, 0, 0]
    assert tensors["odd"].start > tensors["b"].start
    view = view_tensor(map_file(path), tensors["b"])
    array = jax.device_put(view, jax.devices("cpu")[0])
    assert array.unsafe_buffer_pointer() == view.ctypes.data
    # A donated array over a mapped file is copied first, so that the file does not change.
    doubled = jax.jit(lambda x: x * 2, donate_argnums=0)(array)
    assert np.all(np.asarray(doubled) == 2)
    assert np.all(view == 1)


def test_chunks_of_another_size(tmp_path):
    with pytest.raises(ValueError, match="a: the chunks have 3 bytes, expected 4"):
        write_safetensors(tmp_path / "x", {"a": ("F32", (1,))}, lambda key: [memoryview(b"123")])
    assert not (tmp_path / "x").exists()


def test_small_files_are_written_by_the_safetensors_package(tmp_path):
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    arrays = {"a": matrix, "b": np.ones(3, ml_dtypes.bfloat16)}
    save_arrays(tmp_path / "x", arrays | {"transposed": matrix.T}, {"format": "pt"})
    loaded = load_file(tmp_path / "x")
    assert all(same_bits(loaded[key], array) for key, array in arrays.items())
    assert np.array_equal(loaded["transposed"], matrix.T)
    with safe_open(tmp_path / "x", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    with pytest.raises(OSError, match=f"{tmp_path / 'nowhere' / 'x'}: .*No such file"):
        save_arrays(tmp_path / "nowhere" / "x", arrays)


def test_shards_are_filled_in_order():
    tensors = {name: ("F32", (size,)) for name, size in zip("abcd", (1, 2, 9, 1), strict=True)}
    assert plan_shards(tensors, max_shard_bytes=12) == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c"],
        "model-00003-of-00003.safetensors": ["d"],
    }
