"""The results of the serving benchmark, not its speed."""

import pytest
from serving_setup import MAX_NUM_SEQS

from benchmarks import server_throughput


@pytest.mark.slow
def test_throughput_and_load_test(url, scheduler):
    bodies = [server_throughput.description_request(n) for n in range(2)]
    found = server_throughput.compare_throughput(url, bodies, MAX_NUM_SEQS, rounds=1)
    one, many, ratio = (found[name] for name in ("one_at_a_time", "concurrent", "ratio"))
    assert [times["repeats"] for times in (one, many, ratio)] == [1, 1, 1]
    assert ratio["median"] == pytest.approx(many["median"] / one["median"])
    assert 5 < found["tokens_per_answer"] <= 128
    found = server_throughput.run_soak_test(url, scheduler, num_requests=20, concurrency=4)
    assert found["slots_in_use_after"] == 0 and found["memory_after"] > 2**20
    assert sum(found["results"].values()) == 20 and found["results"]["200"] > 5
