"""The training benchmark against PyTorch, on a batch of two rows."""

import pytest

from benchmarks.train_against_torch import TrainingCase, compare_training_steps

pytestmark = pytest.mark.torch


@pytest.mark.exhaustive
def test_both_implementations_learn_and_are_measured():
    case = TrainingCase(width=64, dtype="float32", rows=2, length=32, threads=1)
    results = compare_training_steps(case, repeats=3)
    assert results.keys() == {"jax", "torch"}
    for result in results.values():
        assert result["losses"][-1] < result["losses"][0]
        assert 0 < result["fastest"] <= result["seconds"] <= result["slowest"]
        assert round(result["tokens_per_second"] * result["seconds"]) == 64
        assert 2**26 < result["before"] <= result["peak"]
