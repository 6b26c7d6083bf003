"""Property tests: any bytes as a header, compared with the safetensors package."""

import io
import json
import tracemalloc
from pathlib import Path

import pytest
from golden_copies import DTYPES, GOLDEN, same_bits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from ovis_jax.checkpoint.safetensors_reader import (
    SafetensorsHeader,
    map_file,
    parse_header,
    read_header,
    view_tensor,
)

SMALL = (0, 1, 2, 3, 4, 7, 8, 12, 16)
HUGE = (2**31, 2**32 - 4, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -1)
NUMBERS = st.sampled_from(SMALL) | st.sampled_from(HUGE)
ALLOWED = 1 << 20  # bytes in addition to a multiple of the file's size


_MORE_THAN_JSON = b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"more":[NaN]}}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("headers")


def read_with_safetensors(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    """Dtypes and shapes as the safetensors package reads them, or None if it rejects the file."""
    try:
        with safe_open(path, "np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            return {key: (x.get_dtype(), x.get_shape()) for key, x in slices.items()}
    except SafetensorError:
        return None


def check_header(path: Path, content: bytes) -> SafetensorsHeader:
    """Read a file in both ways; a header without problems must be valid and read alike."""
    path.write_bytes(content)
    tracemalloc.start()
    header = read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A size in a header allocates nothing.
    assert peak < ALLOWED + 40 * len(content)
    assert isinstance(header, SafetensorsHeader)
    assert all(row.file == path.name and row.expected and row.found for row in header.problems)
    if header.readable and not header.problems:
        found = {info.key: (info.dtype, list(info.shape)) for info in header.tensors}
        assert found == read_with_safetensors(path)
        with safe_open(path, "np") as file:
            for info in header.tensors:
                if info.dtype in DTYPES:
                    view = view_tensor(map_file(path), info)
                    assert same_bits(view, file.get_tensor(info.key))
    return header


@given(content=st.binary(max_size=200))
@example(content=b"")
@example(content=(1 << 60).to_bytes(8, "little"))
@example(content=(2).to_bytes(8, "little") + b"{}")
@example(content=len(_MORE_THAN_JSON).to_bytes(8, "little") + _MORE_THAN_JSON)
@settings(max_examples=80)
def test_random_bytes(folder, content):
    check_header(folder / "random", content)


@given(text=st.binary(max_size=100), length=NUMBERS.filter(lambda x: 0 <= x < 2**64))
@settings(max_examples=80)
def test_random_headers_of_any_length(folder, text, length):
    check_header(folder / "length", length.to_bytes(8, "little") + text)
    check_header(folder / "length", len(text).to_bytes(8, "little") + text)


JSON = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=3)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "F4", "f32", ""]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2),
    },
    optional={"more": JSON},
)
ANY = st.recursive(
    JSON, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x), max_leaves=5
)


@pytest.mark.slow
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__", ""]), ENTRY | ANY, max_size=3
    ),
    data=st.sampled_from([b"", bytes(range(4)), bytes(range(16))]),
)
@settings(max_examples=120)
def test_headers_with_any_json(folder, header, data):
    text = json.dumps(header).encode()
    check_header(folder / "any", len(text).to_bytes(8, "little") + text + data)


VALID = st.lists(
    st.tuples(
        st.sampled_from([("F32", 4), ("F16", 2), ("BF16", 2)]),
        st.lists(st.sampled_from([0, 1, 2, 3]), max_size=3),
    ),
    max_size=5,
)


def valid_file(tensors: list[tuple[tuple[str, int], list[int]]]) -> bytes:
    header, stop = {}, 0
    for number, ((dtype, size), shape) in enumerate(tensors):
        start = stop
        for length in shape:
            size *= length
        stop += size
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(i % 251 for i in range(stop))


@given(tensors=VALID)
@settings(max_examples=40)
def test_valid_headers_are_accepted(folder, tensors):
    header = check_header(folder / "valid", valid_file(tensors))
    assert header.readable and not header.problems and len(header.tensors) == len(tensors)


@given(tensors=VALID, data=st.data())
@settings(max_examples=120)
def test_one_number_of_a_valid_header_changed(folder, tensors, data):
    content = valid_file(tensors)
    stop = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:stop])
    if header:
        entry = header[data.draw(st.sampled_from(sorted(header)))]
        numbers = entry[data.draw(st.sampled_from(["shape", "data_offsets"]))]
        if numbers:
            numbers[data.draw(st.integers(0, len(numbers) - 1))] = data.draw(NUMBERS)
    text = json.dumps(header).encode()
    changed = len(text).to_bytes(8, "little") + text + content[stop:]
    check_header(folder / "changed", changed)
    # The header alone, as of a file that is not local, shows what the package rejects.
    problems = parse_header(folder / "changed", io.BytesIO(changed)).problems
    too_large = any("a shape of fewer" in row.expected for row in problems)
    assert too_large or (read_with_safetensors(folder / "changed") is None) == bool(problems)


@pytest.fixture(scope="module")
def real() -> bytes:
    """A shard of a golden checkpoint."""
    return (GOLDEN / "tiny-bf16-sharded" / "model-00003-of-00003.safetensors").read_bytes()


@given(data=st.data())
@settings(max_examples=100)
def test_a_real_header_with_bytes_changed(folder, real, data):
    end = 8 + int.from_bytes(real[:8], "little")
    content = bytearray(real)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, end - 1))
        if data.draw(st.booleans()):
            content[place] = data.draw(st.integers(0, 255))
        else:
            content[place] ^= 1 << data.draw(st.integers(0, 7))
    content = content[: data.draw(st.sampled_from([len(content), len(content) - 1, end - 1, 9]))]
    check_header(folder / "real", bytes(content))
