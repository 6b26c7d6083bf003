"""The benchmark of accelerators without a compiler: its tables and checks."""

import json

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import accelerators
from benchmarks.accelerators import TARGETS, checks, compiled, report

runner = CliRunner()


@pytest.fixture(scope="module")
def app():
    app = typer.Typer()
    app.command()(accelerators.main)
    return app


def test_every_target_fits_by_arithmetic(app, tmp_path):
    output, picture = tmp_path / "found.json", tmp_path / "found.png"
    options = ["--by", "arithmetic", "--json", str(output), "--plot", str(picture)]
    result = runner.invoke(app, options)
    assert result.exit_code == 0, result.output
    plans = json.loads(output.read_text())["plans"]
    assert [plan["topology"] for plan in plans] == list(TARGETS)
    assert all(plan["checks"] == {"fits": True} for plan in plans)
    assert picture.stat().st_size > 1000


STEP = {
    "arguments": 1000,
    "output": 600,
    "aliased": 600,
    "temp": 19,
    "peak": 1100,
    "cache": 600,
    "collectives": {"all-reduce": {"count": 85, "bytes": 9}},
    "all_reduces_a_block": 2,
    "weight_sized": {"copies": 0, "all-gathers": 0, "all-reduces": 0},
    "kernels": {"splash_mha_fwd tpu_custom_call": 42},
    "compile_seconds": 9.0,
}


def plan(**steps):
    return {"topology": "v5e:2x4", "fits": True, "steps": steps}


def test_checks_hold():
    found = checks(plan(decode=STEP, prefill=STEP, images=STEP))
    assert len(found) == 17 and all(found.values())
    assert report([plan(decode=STEP)]) == 0


@pytest.mark.parametrize(
    ("step", "change", "named"),
    [
        ("decode", {"aliased": 599}, "decode: cache fully aliased"),
        ("decode", {"temp": 20}, "decode: temp under 2% of arguments"),
        ("decode", {"all_reduces_a_block": 3}, "decode: at most 2 all-reduces a block"),
        ("decode", {"weight_sized": {"copies": 1}}, "decode: no weight-sized copies"),
        ("prefill", {"kernels": {}}, "prefill: attention kernel is there"),
        (
            "prefill",
            {"kernels": {"dot tpu_custom_call": 9}},
            "prefill: attention kernel is there",
        ),
        ("images", {"temp": 2**30}, "images: temp under 1 GiB"),
        ("prefill", {"error": "RESOURCE_EXHAUSTED", "peak": None}, "prefill: compiles"),
    ],
)
def test_each_check_can_fail(capsys, step, change, named):
    found = plan(**{step: {**STEP, **change}})
    assert [name for name, good in checks(found).items() if not good] == [named]
    assert report([found]) == 1 and named in capsys.readouterr().out
    columns, rows = compiled([found])
    assert len(rows) == 1 and len(rows[0]) == len(columns)
