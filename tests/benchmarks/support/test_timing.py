"""Timing in turns."""

from benchmarks.support.timing import Timings, format_timing, time_in_turns


def test_calls_take_turns_and_warmup_rounds_do_not_count():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = time_in_turns(calls, repeats=3, warmup_rounds=1)
    assert "".join(order) == "abbaabba"
    assert {name: len(t.seconds) for name, t in timings.items()} == {"a": 3, "b": 3}


def test_timings_are_reported_as_median_and_range():
    timing = Timings((0.004, 0.001, 0.002)).to_json()
    assert timing == {"median": 0.002, "fastest": 0.001, "slowest": 0.004, "repeats": 3}
    assert format_timing(timing) == "2 (1 - 4)"
