"""The benchmark beside PyTorch, on a batch of two rows."""

from benchmarks.train_against_torch import Case, compare


def test_both_sides_learn_and_are_measured():
    case = Case(width=64, dtype="float32", rows=2, length=32, threads=1)
    found = compare(case, repeats=3)
    assert found.keys() == {"jax", "torch"}
    for side in found.values():
        assert side["losses"][-1] < side["losses"][0]
        assert 0 < side["fastest"] <= side["seconds"] <= side["slowest"]
        assert round(side["tokens_per_second"] * side["seconds"]) == 64
        assert 2**26 < side["before"] <= side["peak"]
