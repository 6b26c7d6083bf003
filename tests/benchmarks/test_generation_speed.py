"""The output of the generation benchmark, not its speed."""

import json
from functools import partial

import jax
import pytest

from benchmarks import generation_speed
from benchmarks.support import machine_peaks
from benchmarks.support.benchmark_model import BenchmarkModel
from benchmarks.support.stage_costs import decode_cost

STAGES = ("preprocess", "vision", "prefill", "first_token", "step")


@pytest.mark.exhaustive
def test_every_stage_of_every_shape(small, monkeypatch, tmp_path):
    monkeypatch.setattr(
        machine_peaks, "copy_bandwidth", partial(machine_peaks.copy_bandwidth, 2**20, 1)
    )
    json_path, plot_path = tmp_path / "results.json", tmp_path / "plot.png"
    generation_speed.main(
        dtype="float32",
        batch=[2],
        length=[24],
        new_tokens=3,
        repeats=2,
        json_path=json_path,
        plot_path=plot_path,
    )
    results = json.loads(json_path.read_text())
    assert results["machine"]["platform"] == "cpu" and results["dtype"] == "float32"
    (row,) = results["rows"]
    assert (row["batch"], row["positions"], row["crops"]) == (2, 24, 1)
    for stage in STAGES:
        assert 0 < row[stage]["fastest"] <= row[stage]["median"] <= row[stage]["slowest"]
        assert row[stage]["repeats"] == 2
    assert row["tokens_per_second"] == pytest.approx(2 / row["step"]["median"])
    assert row["step_bytes"] == decode_cost(small, 2, 24 + 1, 4).bytes
    min_seconds = row["step_bytes"] / results["copy_bytes_per_second"]
    assert row["bandwidth_share"] == pytest.approx(min_seconds / row["step"]["median"])
    assert row["peak_memory"]["of"] == "process" and row["peak_memory"]["bytes"] > 2**26
    assert plot_path.read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_is_preprocessed_with_its_processor(load_golden):
    ovis = load_golden("tiny-f32", "float32")
    benchmark_model = BenchmarkModel("golden", ovis.model, ovis.params, ovis.processor)
    preprocess = generation_speed.prepare_preprocessing(benchmark_model, 2, 3)
    assert preprocess().pixels.shape == (6, 70, 70, 3)
    without_processor = BenchmarkModel("random", ovis.model, ovis.params, None)
    preprocess = generation_speed.prepare_preprocessing(without_processor, 2, 3)
    assert [x.shape for x in preprocess()] == [(1, 70, 70, 3)] * 6


def test_peak_memory_of_a_device_with_a_counter(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"peak_bytes_in_use": 17}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert generation_speed.peak_memory() == {"bytes": 17, "of": "device"}
