"""What the benchmark of serving writes, not how fast anything is."""

import json

from served import SLOTS

from benchmarks import serving


def test_both_ways_and_a_storm(steps, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(serving, "Steps", lambda *_, **sizes: steps)
    output = tmp_path / "found.json"
    serving.main(concurrency=SLOTS, questions=3, rounds=2, requests=30, output=output)
    found = json.loads(output.read_text())
    for name in ("one_at_a_time", "concurrent", "ratio"):
        assert 0 < found[name]["fastest"] <= found[name]["slowest"]
        assert found[name]["repeats"] == 2
    assert found["machine"]["platform"] == "cpu" and found["concurrency"] == SLOTS
    assert found["soak"]["slots_taken_after"] == 0
    ends = found["soak"]["ends"]
    assert sum(ends.values()) == 30 and ends["200"] > 5
    assert "a storm of 30 requests" in capsys.readouterr().out
