"""What the benchmark of generation writes, not how fast anything is."""

import json
from functools import partial

import jax
import pytest

from benchmarks import floors, generate, measure

STAGES = ("preprocess", "vision", "prefill", "first_token", "step")


def test_every_stage_of_every_shape(small, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "copy_bandwidth", partial(measure.copy_bandwidth, 2**20, 1))
    output, picture = tmp_path / "found.json", tmp_path / "found.png"
    generate.main(
        dtype="float32",
        batch=[2],
        length=[24],
        new_tokens=3,
        repeats=2,
        output=output,
        picture=picture,
    )
    found = json.loads(output.read_text())
    assert found["machine"]["platform"] == "cpu" and found["dtype"] == "float32"
    (row,) = found["rows"]
    assert (row["batch"], row["positions"], row["crops"]) == (2, 24, 1)
    for stage in STAGES:
        assert 0 < row[stage]["fastest"] <= row[stage]["median"] <= row[stage]["slowest"]
        assert row[stage]["repeats"] == 2
    assert row["tokens_per_second"] == pytest.approx(2 / row["step"]["median"])
    assert row["step_bytes"] == floors.decode(small, 2, 24 + 1, 4).bytes
    floor = row["step_bytes"] / found["copy_bytes_per_second"]
    assert row["bandwidth_share"] == pytest.approx(floor / row["step"]["median"])
    assert row["peak_memory"]["of"] == "process" and row["peak_memory"]["bytes"] > 2**26
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_is_preprocessed_with_its_processor(load_golden):
    ovis = load_golden("tiny-f32", "float32")
    measured = generate.Measured("golden", ovis.model, ovis.params, ovis.processor)
    assert generate.preprocess(measured, 2, 3)().pixels.shape == (6, 70, 70, 3)
    random = generate.Measured("random", ovis.model, ovis.params, None)
    made = generate.preprocess(random, 2, 3)()
    assert [x.shape for x in made] == [(1, 70, 70, 3)] * 6


def test_memory_of_a_device_where_it_is_counted(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"peak_bytes_in_use": 17}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert generate.peak_memory() == {"bytes": 17, "of": "device"}
