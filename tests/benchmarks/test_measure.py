"""What the benchmarks share."""

import json

import jax.numpy as jnp

from benchmarks import measure


def test_calls_take_turns_and_warm_rounds_do_not_count():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure.alternate(calls, repeats=3, warm=1)
    assert "".join(order) == "abbaabba"
    assert {name: len(t.seconds) for name, t in times.items()} == {"a": 3, "b": 3}


def test_times_are_told_as_median_and_extremes():
    times = measure.Times((0.004, 0.001, 0.002))
    assert times.to_json() == {"median": 0.002, "fastest": 0.001, "slowest": 0.004, "repeats": 3}
    assert times.text() == "2 (1 - 4)"


def test_what_the_machine_can_do_is_positive():
    assert 1e7 < measure.copy_bandwidth(2**20, repeats=1) < 1e14
    assert 1e6 < measure.matmul_rate(jnp.float32, [64], repeats=1) < 1e17


def test_json_and_plot_are_written(tmp_path):
    machine = measure.machine(threads=1)
    assert machine["versions"]["jax"] and machine["threads"] == 1
    measure.write_json(tmp_path / "new" / "a.json", machine=machine, rows=[1])
    assert json.loads((tmp_path / "new" / "a.json").read_text())["rows"] == [1]
    for lines in (False, True):
        path = tmp_path / f"{lines}.png"
        measure.plot(path, "title", [1, 2], {"x": [1.0, 2.0]}, "ms", lines=lines, level=1.0)
        assert path.read_bytes().startswith(b"\x89PNG")
