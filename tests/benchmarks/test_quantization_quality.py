"""The formats and the questions of the quality benchmark."""

import jax
import numpy as np

from benchmarks import quantization_quality
from benchmarks.support.benchmark_model import quantize_params
from ovis_jax import load


def test_the_formats_are_those_of_load(golden, load_golden):
    ovis = load_golden("tiny-bf16-sharded", "bfloat16")
    found = quantize_params(ovis.params, ovis.config, "int4")
    expected = load(golden / "tiny-bf16-sharded", dtype="bfloat16", quantization="int4")
    assert jax.tree.structure(found) == jax.tree.structure(expected.params)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected.params), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)


def test_questions_have_pictures(load_golden):
    """The questions of the generator fit the processor of any checkpoint."""
    processor = load_golden("tiny-f32", "float32").processor
    inputs = quantization_quality.make_questions(processor, 3)
    assert inputs.tokens.shape[0] == 3 and len(inputs.pixels) >= 3
