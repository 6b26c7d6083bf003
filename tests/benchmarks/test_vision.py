"""What the benchmark of the visual path writes, not how fast anything is."""

import json
from functools import partial

import pytest

from benchmarks import floors, measure, vision


def test_every_number_of_crops(small, monkeypatch, tmp_path):
    rate = partial(measure.matmul_rate, sizes=(64,), repeats=1)
    monkeypatch.setattr(measure, "matmul_rate", rate)
    output, picture = tmp_path / "found.json", tmp_path / "found.png"
    vision.main(dtype="float32", crops=[3, 1], repeats=2, output=output, picture=picture)
    found = json.loads(output.read_text())
    assert [row["crops"] for row in found["rows"]] == [1, 3]
    for row in found["rows"]:
        crops, seconds = row["crops"], row["seconds"]["median"]
        assert row["ms_per_crop"] == pytest.approx(1e3 * seconds / crops) and seconds > 0
        work = floors.vision(small, crops, 4) + floors.visual_tokens(small, crops, 4)
        assert row["flops"] == work.flops
        share = work.flops / seconds / found["matmul_flops_per_second"]
        assert row["flop_share"] == pytest.approx(share) and share > 0
        assert row["temp_bytes"] > crops * 25 * 48 * 4  # more than the features of the patches
    assert found["rows"][1]["flops"] == 3 * found["rows"][0]["flops"]
    assert picture.read_bytes().startswith(b"\x89PNG")
