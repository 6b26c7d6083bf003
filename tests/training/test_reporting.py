"""Progress lines without a terminal, and samples of answers."""

import io

import jax.numpy as jnp
import pytest
from rich.console import Console

from ovis_jax.training import reporting
from ovis_jax.training.reporting import AnswerSample, MetricsWriter, ProgressBar


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=80, record=True)


@pytest.mark.parametrize("peak", [None, 1e12])
def test_lines_without_a_terminal(console, monkeypatch, peak):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(reporting, "SECONDS_BETWEEN_LINES", 15)
    with ProgressBar(console, 0, 100, peak) as bar:
        rates = [bar.update(step, 200, 2.5e12, jnp.float32(2.0)) for step in (1, 2, 3)]
    lines = console.export_text().splitlines()
    speed = lines[0].partition("loss 2.0000, ")[2]
    mfu = "" if peak is None else f"MFU {rates[0]['mfu']:.1%}, "
    assert lines[0].startswith("step 1 of 100: ") and lines[1].startswith("step 2 of 100: ")
    assert speed.startswith("20 tokens/s, 0.25 TFLOP/s per device, " + mfu)
    assert speed.endswith("0:16:30 left")
    assert rates[0]["tokens_per_second"] == 20 and rates[0]["tflops_per_device"] == 0.25
    assert rates[0].get("mfu") == (None if peak is None else 0.25)


def test_pauses_do_not_change_the_speed(console, monkeypatch):
    now = 0.0
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: now)
    with ProgressBar(console, 0, 100) as bar:
        now = 10.0
        before = bar.update(1, 200, 1e12, jnp.float32(2.0))
        with bar.paused():
            now = 500.0
        now = 510.0
        assert bar.update(2, 200, 1e12, jnp.float32(2.0)) == pytest.approx(before)


def test_sample_in_one_line():
    line = AnswerSample("row", "<image>\nWho?", "\x1b[31m", "x" * 300).describe()
    assert line.startswith(r'  "<image>\nWho?": expected "\u001b[31m", generated "xxx')
    assert len(line) < 300 and line.endswith('..."')


def test_samples_of_a_repeated_validation(tmp_path):
    sample = AnswerSample("row", "Who?", "I.", "Ü.")
    writer = MetricsWriter(tmp_path, 0)
    for step in (2, 4):
        writer.write_samples(step, [sample])
        if step == 2:
            writer.write(step, {"accuracy": 0.0})
    writer.close()
    MetricsWriter(tmp_path, 4).close()  # the run was killed before the accuracy of step 4
    (line,) = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert '"step": 2' in line and '"generated": "Ü."' in line
