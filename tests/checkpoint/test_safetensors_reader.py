import errno
import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from golden_copies import CHECKPOINTS, GOLDEN, same_bits
from safetensors.numpy import load_file, save_file

from ovis_jax.checkpoint.safetensors_reader import (
    TensorInfo,
    map_file,
    read_chunks,
    read_header,
    view_tensor,
)
from ovis_jax.errors import CheckpointError


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def read_all(path: Path) -> dict[str, np.ndarray]:
    """Every tensor, mapped and in chunks, which must agree."""
    tensors = {}
    for info in read_header(path).tensors:
        view = view_tensor(map_file(path), info)
        streamed = b"".join(bytes(chunk) for chunk in read_chunks(info, size=64))
        assert view.tobytes() == streamed
        tensors[info.key] = view
    return tensors


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_same_tensors_as_the_safetensors_package(name):
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
        ({"a": entry("F32", [0], 0, 0) | {"x": float("nan")}}, b"", "header", "expected value"),
        ({"a": entry("Q9", [1], 0, 4)}, b"1234", "header", "unknown variant `Q9`"),
    ],
)  # fmt: skip
def test_faults_become_rows(tmp_path, header, data, problem, found):
    path = write_raw(tmp_path / "x.safetensors", header, data)
    rows = read_header(path).problems
    assert any(row.problem == problem and found in row.found for row in rows), rows
    assert all(row.file == "x.safetensors" for row in rows)


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 100_000_001, 1000])
def test_impossible_header_length(tmp_path, length):
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
    assert found.unusable_keys == {"c"}


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


def test_read_error_names_its_file():
    unreadable = Path("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error") as error:
        list(read_chunks(TensorInfo(unreadable, "key", "F32", (1,), 0, 4)))
    assert (error.value.errno, error.value.filename) == (errno.EIO, str(unreadable))
