"""The output of the vision benchmark, not its speed."""

import json
from functools import partial

import pytest

from benchmarks import vision_speed
from benchmarks.support import machine_peaks
from benchmarks.support.stage_costs import vision_cost, visual_head_cost


@pytest.mark.slow
def test_every_number_of_crops(small, monkeypatch, tmp_path):
    rate = partial(machine_peaks.matmul_flop_rate, sizes=(64,), repeats=1)
    monkeypatch.setattr(machine_peaks, "matmul_flop_rate", rate)
    json_path, plot_path = tmp_path / "results.json", tmp_path / "plot.png"
    vision_speed.main(
        dtype="float32", crops=[3, 1], repeats=2, json_path=json_path, plot_path=plot_path
    )
    results = json.loads(json_path.read_text())
    assert [row["crops"] for row in results["rows"]] == [1, 3]
    for row in results["rows"]:
        crops, seconds = row["crops"], row["seconds"]["median"]
        assert row["ms_per_crop"] == pytest.approx(1e3 * seconds / crops) and seconds > 0
        cost = vision_cost(small, crops, 4) + visual_head_cost(small, crops, 4)
        assert row["flops"] == cost.flops
        share = cost.flops / seconds / results["matmul_flops_per_second"]
        assert row["flop_share"] == pytest.approx(share) and share > 0
        assert row["temp_bytes"] > crops * 25 * 48 * 4  # more than the patch features
    assert results["rows"][1]["flops"] == 3 * results["rows"][0]["flops"]
    assert plot_path.read_bytes().startswith(b"\x89PNG")
