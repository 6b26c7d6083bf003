"""Progress of a run where the output is not a terminal."""

import io
import re

from rich.console import Console

from ovis_jax.batch import progress


def test_lines_state_rate_and_remaining_time(monkeypatch):
    times = iter([0.0, 30.0, 30.0, 60.0, 60.0, 90.0, 90.0, 130.0, 130.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    output = io.StringIO()
    with progress.BatchProgress(Console(file=output, width=40), 10, 1014) as shown:
        for _ in range(4):
            shown.add_row(300)
    assert shown.num_tokens == 1200
    lines = [re.sub(r"\s+", " ", line) for line in output.getvalue().splitlines() if line]
    assert lines == [
        "12 of 1,014 rows: 10 tokens/s, 8:21:00 left",
        "14 of 1,014 rows: 9 tokens/s, 9:01:40 left",
    ]
