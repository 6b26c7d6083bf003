"""Properties of headers: whatever their bytes are, with the official library as the judge."""

import json
import tracemalloc
from pathlib import Path

import pytest
from golden_copies import DTYPES, GOLDEN, same_bits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from ovis_jax.checkpoint.safetensors_files import Header, map_file, read_header, view_tensor

SMALL = (0, 1, 2, 3, 4, 7, 8, 12, 16)
HUGE = (2**31, 2**32 - 4, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -1)
NUMBERS = st.sampled_from(SMALL) | st.sampled_from(HUGE)
ALLOWED = 1 << 20  # bytes beyond a multiple of the file's own


_MORE_THAN_JSON = b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"more":[NaN]}}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("headers")


def judge(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    """Dtypes and shapes as the official library reads them, or None where it refuses the file."""
    try:
        with safe_open(path, "np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            return {key: (x.get_dtype(), x.get_shape()) for key, x in slices.items()}
    except SafetensorError:
        return None


def hold_to_the_judge(path: Path, content: bytes) -> Header:
    """Read a file in both ways; whatever is found sound must be so and read alike."""
    path.write_bytes(content)
    tracemalloc.start()
    header = read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Nothing is allocated because a header says how large something is.
    assert peak < ALLOWED + 40 * len(content)
    assert isinstance(header, Header)
    assert all(row.file == path.name and row.expected and row.found for row in header.problems)
    official = judge(path)
    if header.readable and not header.problems:
        found = {entry.key: (entry.dtype, list(entry.shape)) for entry in header.tensors}
        unknown = {dtype for dtype, _ in found.values()} - {"F32", "F16", "BF16"}
        if official is None:
            # A dtype that is not known here is refused by its name, when it is accounted for.
            assert unknown, header
            return header
        assert found == official
        with safe_open(path, "np") as file:
            for entry in header.tensors:
                if entry.dtype in DTYPES:
                    view = view_tensor(map_file(path), entry)
                    assert same_bits(view, file.get_tensor(entry.key))
    return header


@given(content=st.binary(max_size=200))
@example(content=b"")
@example(content=(1 << 60).to_bytes(8, "little"))
@example(content=(2).to_bytes(8, "little") + b"{}")
@example(content=len(_MORE_THAN_JSON).to_bytes(8, "little") + _MORE_THAN_JSON)
@settings(max_examples=80)
def test_random_bytes(folder, content):
    hold_to_the_judge(folder / "random", content)


@given(text=st.binary(max_size=100), length=NUMBERS.filter(lambda x: 0 <= x < 2**64))
@settings(max_examples=80)
def test_random_headers_of_any_length(folder, text, length):
    hold_to_the_judge(folder / "length", length.to_bytes(8, "little") + text)
    hold_to_the_judge(folder / "length", len(text).to_bytes(8, "little") + text)


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


@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__", ""]), ENTRY | ANY, max_size=3
    ),
    data=st.sampled_from([b"", bytes(range(4)), bytes(range(16))]),
)
@settings(max_examples=120)
def test_headers_that_say_anything(folder, header, data):
    text = json.dumps(header).encode()
    hold_to_the_judge(folder / "any", len(text).to_bytes(8, "little") + text + data)


SOUND = st.lists(
    st.tuples(
        st.sampled_from([("F32", 4), ("F16", 2), ("BF16", 2)]),
        st.lists(st.sampled_from([0, 1, 2, 3]), max_size=3),
    ),
    max_size=5,
)


def sound_file(tensors: list[tuple[tuple[str, int], list[int]]]) -> bytes:
    header, stop = {}, 0
    for number, ((dtype, size), shape) in enumerate(tensors):
        start = stop
        for length in shape:
            size *= length
        stop += size
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(i % 251 for i in range(stop))


@given(tensors=SOUND)
@settings(max_examples=40)
def test_what_is_sound_is_accepted(folder, tensors):
    header = hold_to_the_judge(folder / "sound", sound_file(tensors))
    assert header.readable and not header.problems and len(header.tensors) == len(tensors)


@given(tensors=SOUND, data=st.data())
@settings(max_examples=120)
def test_one_number_of_a_sound_header_changed(folder, tensors, data):
    content = sound_file(tensors)
    stop = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:stop])
    if header:
        entry = header[data.draw(st.sampled_from(sorted(header)))]
        numbers = entry[data.draw(st.sampled_from(["shape", "data_offsets"]))]
        if numbers:
            numbers[data.draw(st.integers(0, len(numbers) - 1))] = data.draw(NUMBERS)
    text = json.dumps(header).encode()
    whole = len(text).to_bytes(8, "little") + text + content[stop:]
    found = hold_to_the_judge(folder / "changed", whole)
    # What the official library takes is taken here too, but for shapes that no array can have.
    too_large = any("a shape of fewer" in row.expected for row in found.problems)
    assert too_large or (judge(folder / "changed") is None) == bool(found.problems)


@pytest.fixture(scope="module")
def real() -> bytes:
    """A real header, and as much of the file as it speaks of."""
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
    hold_to_the_judge(folder / "real", bytes(content))
