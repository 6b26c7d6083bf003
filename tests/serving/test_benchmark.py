"""What the benchmark of serving finds, not how fast anything is."""

from served import SLOTS

from benchmarks import serving


def test_both_ways_and_a_storm(url, engine):
    found = serving.compare(url, [serving.describe(n) for n in range(2)], SLOTS, rounds=1)
    for name in ("one_at_a_time", "concurrent", "ratio"):
        assert 0 < found[name]["fastest"] == found[name]["slowest"]
    assert found["tokens_per_answer"] > 5
    found = serving.soak(url, engine, requests=20, at_once=4)
    assert found["slots_taken_after"] == 0 and found["memory_after"] > 2**20
    assert sum(found["ends"].values()) == 20 and found["ends"]["200"] > 5
