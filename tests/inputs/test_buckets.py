"""The default ladder of lengths, its padding, and user-defined buckets."""

from dataclasses import replace

import numpy as np
import pytest
from golden_copies import GOLDEN
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovis_jax import presets
from ovis_jax.config import OvisConfig
from ovis_jax.errors import RequestError
from ovis_jax.inputs.buckets import CROP_BUCKET, TOKEN_BUCKET, Bucket, bucket_size, choose_bucket
from ovis_jax.inputs.processor import Processor

CHECKPOINT = GOLDEN / "tiny-f32"


def test_the_ladder():
    steps = sorted({bucket_size(n, 64) for n in range(1, 2000)})
    assert steps[:8] == [64, 128, 192, 256, 320, 384, 448, 512]
    assert steps[8:] == [640, 768, 896, 1024, 1280, 1536, 1792, 2048]
    crops = sorted({bucket_size(n, 1) for n in range(30)})
    assert crops == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32]


@given(st.integers(0, 10**6), st.integers(1, 256))
def test_padding_is_bounded(n, unit):
    length = bucket_size(n, unit)
    assert n <= length and length % unit == 0
    assert length - n < unit or 4 * (length - n) < n
    assert bucket_size(length, unit) == length
    assert n == 0 or bucket_size(n - 1, unit) <= length


@pytest.mark.parametrize(
    "unit, max_length, num_steps",
    [(TOKEN_BUCKET, 8192, 24), (CROP_BUCKET, 10 * 32, 29)],
    ids=["positions", "crops"],
)
def test_the_bounds_in_the_docstring(unit, max_length, num_steps):
    """Less than a fifth is padding, or less than one unit below 4 units; 24 lengths up to 8192."""
    lengths = [bucket_size(n, unit) for n in range(1, max_length + 1)]
    for n, length in enumerate(lengths, 1):
        assert 5 * (length - n) < length or (n <= 4 * unit and length - n < unit)
    assert lengths == sorted(lengths) and len(set(lengths)) == num_steps


def test_the_bucket_with_the_least_padding():
    known = [Bucket(4, 512, 10), Bucket(1, 512, 10), Bucket(1, 256, 1), Bucket(1, 256, 10)]
    assert choose_bucket(known, 1, 256, 1) == (1, 256, 1)
    assert choose_bucket(known, 1, 256, 2) == (1, 256, 10)
    assert choose_bucket(known, 1, 257, 0) == (1, 512, 10)
    assert choose_bucket(known, 2, 1, 0) == (4, 512, 10)
    for batch in [(5, 1, 0), (1, 513, 0), (1, 1, 11)]:
        with pytest.raises(RequestError, match="exceeds every bucket; there are 4x512x10, 1x512"):
            choose_bucket(known, *batch)


def test_a_batch_in_a_user_s_bucket():
    processor = Processor.from_folder(CHECKPOINT, OvisConfig.from_folder(CHECKPOINT))
    image = Image.new("RGB", (70, 70), "red")
    expected = processor(["Who?", "Why?"], [[], [image]])
    inputs = replace(processor, buckets=(Bucket(3, 100, 4),))(["Who?", "Why?"], [[], [image]])
    assert inputs.tokens.shape == inputs.positions.shape == (3, 100)
    assert inputs.pixels.shape == (4, 70, 70, 3) and len(expected.pixels) == 1
    np.testing.assert_array_equal(inputs.pixels[:1], expected.pixels)
    for b in range(2):
        length = np.count_nonzero(expected.positions[b] >= 0)
        np.testing.assert_array_equal(inputs.tokens[b, :length], expected.tokens[b, :length])
        assert inputs.positions[b].tolist() == [*range(length), *[-1] * (100 - length)]
    assert (inputs.positions[2] == -1).all() and (inputs.tokens[2] == 0).all()
    with pytest.raises(RequestError, match=r"2 row\(s\), \d+ positions and 1 crop.* exceeds every"):
        replace(processor, buckets=(Bucket(1, 100, 4),))(["Who?", "Why?"], [[], [image]])


@pytest.mark.parametrize(
    "shape, message",
    [
        ((0, 64, 0), "rows and length at least 1"),
        ((1, 0, 0), "rows and length at least 1"),
        ((1, 64.0, 0), "whole numbers"),
        ((1, 8193, 0), r"at most 8192 positions \(multimodal_max_length"),
        ((1, 64, -1), "hold 0 to 7 crops of 9"),
        ((1, 64, 8), "hold 0 to 7 crops of 9"),
    ],
)
def test_buckets_that_no_batch_can_have(shape, message):
    with pytest.raises(RequestError, match=message):
        Bucket(*shape).check(presets.tiny())


def test_the_largest_buckets():
    Bucket(1, 8192, 0).check(presets.tiny())
    Bucket(1, 64, 7).check(presets.tiny())
    Bucket(1, 81, bucket_size(9, CROP_BUCKET)).check(presets.tiny())  # 9 crops are padded to 10
