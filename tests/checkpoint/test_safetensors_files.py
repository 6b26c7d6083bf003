import errno
import json
import struct
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from golden_copies import CHECKPOINTS, DTYPES, GOLDEN, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ovis_jax.checkpoint.problems import naming_file
from ovis_jax.checkpoint.safetensors_files import (
    TensorEntry,
    map_file,
    read_chunks,
    read_header,
    view_tensor,
)
from ovis_jax.checkpoint.safetensors_stream import write_file
from ovis_jax.checkpoint.writer import write_json
from ovis_jax.errors import CheckpointError


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def read_all(path: Path) -> dict[str, np.ndarray]:
    """Every tensor by both ways of reading, which must agree."""
    tensors = {}
    for tensor in read_header(path).tensors:
        view = view_tensor(map_file(path), tensor)
        streamed = b"".join(bytes(piece) for piece in read_chunks(tensor, size=64))
        assert view.tobytes() == streamed
        tensors[tensor.key] = view
    return tensors


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_reads_what_the_official_library_reads(name):
    for path in (GOLDEN / name).glob("*.safetensors"):
        expected = load_file(path)
        assert not read_header(path).problems
        found = read_all(path)
        assert found.keys() == expected.keys()
        assert all(same_bits(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("header", "data", "problem", "found"),
    [
        (b"{", b"", "header", "JSONDecodeError"),
        (b"\xff\xfe{}", b"", "header", "UnicodeDecodeError"),
        (b"[" * 100_000, b"", "header", "RecursionError"),
        ([1], b"", "header", "list"),
        ({"__metadata__": {"format": 1}}, b"", "header", "1"),
        ({"a": 3}, b"", "header entry", "3"),
        ({"a": {"dtype": "F32"}}, b"", "header entry", "F32"),
        ({"a": entry("F32", [-1], 0, 4)}, b"1234", "header entry", "[-1]"),
        ({"a": entry("F32", [True], 0, 4)}, b"1234", "header entry", "[True]"),
        ({"a": entry("F32", [1], 4, 0)}, b"1234", "data offsets", "[4, 0]"),
        ({"a": entry("F32", [1], 0, 2)}, b"12", "data offsets", "2 bytes"),
        ({"a": entry("F32", [2**62, 2**62], 0, 4)}, b"1234", "header entry", "[46116860184"),
        ({"a": entry("F32", [2**62, 0], 0, 0)}, b"", "header entry", "[4611686018427387904, 0]"),
        ({"a": entry("F32", [1], 2**60, 2**60 + 4)}, b"1234", "truncated file", "bytes"),
        ({"a": entry("F32", [1], 0, 4)}, b"123", "truncated file", "bytes"),
        ({"a": entry("F32", [1], 0, 4)}, b"12345", "bytes after the data", "bytes"),
        (
            {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)},
            b"123456",
            "overlapping data",
            "start 2",
        ),
        ({"a": entry("F32", [1], 4, 8)}, b"12345678", "gap before data", "start 4"),
        (
            b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
            b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
            b"",
            "duplicate key in header",
            "more than one",
        ),
    ],
)  # fmt: skip
def test_faults_become_rows(tmp_path, header, data, problem, found):
    path = write_raw(tmp_path / "x.safetensors", header, data)
    rows = read_header(path).problems
    assert any(row.problem == problem and found in row.found for row in rows), rows
    assert all(row.file == "x.safetensors" for row in rows)


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 100_000_001, 1000])
def test_absurd_header_length(tmp_path, length):
    header = read_header(write_raw(tmp_path / "x", {}, length=length))
    assert not header.readable
    assert header.problems[0].problem in ("header length", "truncated file")


def test_file_of_a_few_bytes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert read_header(path).problems[0].problem == "truncated file"


def test_all_faults_of_a_file_at_once(tmp_path):
    header = {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6), "c": "x"}
    found = read_header(write_raw(tmp_path / "x", header, b"1234"))
    assert {row.problem for row in found.problems} == {
        "overlapping data",
        "header entry",
        "truncated file",
    }
    assert found.unusable == {"c"}


def test_file_that_shrinks_after_its_header_was_read(tmp_path):
    path = tmp_path / "x"
    save_file({"a": np.ones(100, np.float32)}, path)
    (tensor,) = read_header(path).tensors
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="has changed"):
        view_tensor(map_file(path), tensor)
    with pytest.raises(CheckpointError, match="has changed"):
        list(read_chunks(tensor))


def test_data_that_is_not_aligned_for_its_dtype(tmp_path):
    values = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16)
    header = {"a": entry("U8", [1], 0, 1), "b": entry("BF16", [6], 1, 13)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = write_raw(tmp_path / "x", text, b"\0" + values.tobytes())
    tensor = read_header(path).tensors[1]
    assert same_bits(view_tensor(map_file(path), tensor), values)


ARRAYS = st.dictionaries(
    st.text(min_size=1).filter(lambda key: key != "__metadata__" and key.isprintable()),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
    max_size=6,
)


@given(layout=ARRAYS, seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_written_files_are_read_by_the_official_library(tmp_path_factory, layout, seed):
    rng = np.random.default_rng(seed)
    arrays = {
        key: rng.standard_normal(shape).astype(DTYPES[dtype])
        for key, (dtype, shape) in layout.items()
    }
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    write_file(
        path,
        {key: (dtype, tuple(shape)) for key, (dtype, shape) in layout.items()},
        lambda key: [memoryview(arrays[key].tobytes())],
    )
    official = load_file(path)
    assert not read_header(path).problems
    assert official.keys() == arrays.keys()
    assert all(same_bits(official[key], arrays[key]) for key in arrays)
    assert all(same_bits(value, arrays[key]) for key, value in read_all(path).items())


def test_written_tensors_are_aligned_and_mapped_by_a_cpu_device(tmp_path):
    path = tmp_path / "x.safetensors"
    layout = {"odd": ("BF16", (3,)), "a": ("F32", (16,)), "b": ("BF16", (64, 64))}
    arrays = {key: np.ones(shape, DTYPES[dtype]) for key, (dtype, shape) in layout.items()}
    write_file(path, layout, lambda key: [memoryview(arrays[key].tobytes())])
    tensors = {tensor.key: tensor for tensor in read_header(path).tensors}
    assert [tensors[key].start % 64 for key in ("a", "b", "odd")] == [0, 0, 0]
    assert tensors["odd"].start > tensors["b"].start
    view = view_tensor(map_file(path), tensors["b"])
    array = jax.device_put(view, jax.devices("cpu")[0])
    assert array.unsafe_buffer_pointer() == view.ctypes.data
    # A donated array that is a mapped file is copied first; the file stays as it is.
    doubled = jax.jit(lambda x: x * 2, donate_argnums=0)(array)
    assert np.all(np.asarray(doubled) == 2)
    assert np.all(view == 1)


def test_writer_refuses_pieces_of_another_size(tmp_path):
    with pytest.raises(ValueError, match="a: 3 bytes written, 4 promised"):
        write_file(tmp_path / "x", {"a": ("F32", (1,))}, lambda key: [memoryview(b"123")])


def test_an_error_of_the_system_names_its_file():
    unreadable = Path("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error") as read:
        list(read_chunks(TensorEntry(unreadable, "key", "F32", (1,), 0, 4)))
    assert (read.value.errno, read.value.filename) == (errno.EIO, str(unreadable))
    with pytest.raises(OSError, match="No space left on device; make room for") as written:
        write_json(Path("/dev/full"), {})
    assert (written.value.errno, written.value.filename) == (errno.ENOSPC, "/dev/full")
    with pytest.raises(ConnectionResetError) as fetched, naming_file(Path("being written")):
        raise ConnectionResetError(errno.ECONNRESET, "reset by peer")
    assert fetched.value.filename is None
