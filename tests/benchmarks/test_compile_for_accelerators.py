"""The tables and checks of the accelerator benchmark, without a compiler."""

import json

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import compile_for_accelerators
from benchmarks.compile_for_accelerators import (
    TARGETS,
    passed_checks,
    print_checks,
    program_table,
)
from ovis_jax.plan import aot_compile

runner = CliRunner()


@pytest.fixture(scope="module")
def app():
    app = typer.Typer()
    app.command()(compile_for_accelerators.main)
    return app


@pytest.mark.slow
def test_every_target_fits_by_arithmetic(app, tmp_path):
    json_path, plot_path = tmp_path / "results.json", tmp_path / "plot.png"
    options = ["--method", "arithmetic", "--json", str(json_path), "--plot", str(plot_path)]
    result = runner.invoke(app, options)
    assert result.exit_code == 0, result.output
    plans = json.loads(json_path.read_text())["plans"]
    assert [plan["topology"] for plan in plans] == [target.topology for target in TARGETS]
    assert [plan["quantization"] for plan in plans] == [target.quantization for target in TARGETS]
    assert all(plan["checks"] == {"fits": True} for plan in plans)
    assert plot_path.stat().st_size > 1000


PROGRAM = {
    "arguments": 1000,
    "output": 600,
    "aliased": 600,
    "temp": 19,
    "peak": 1100,
    "cache": 600,
    "collectives": {"all-reduce": {"count": 85, "bytes": 9}},
    "all_reduces_per_block": 2,
    "weight_sized": {"copies": 0, "dequantized": 0, "all-gathers": 0, "all-reduces": 0},
    "kernels": {"splash_mha_fwd tpu_custom_call": 42},
    "compile_seconds": 9.0,
}


def plan(**programs):
    formats = {"quantization": None, "kv_cache_dtype": "auto"}
    return {"topology": "v5e:2x4", **formats, "fits": True, "programs": programs}


def test_checks_pass():
    passed = passed_checks(plan(decode=PROGRAM, prefill=PROGRAM, images=PROGRAM))
    assert len(passed) == 20 and all(passed.values())
    assert print_checks([plan(decode=PROGRAM)]) == 0


@pytest.mark.parametrize(
    ("program", "change", "check"),
    [
        ("decode", {"aliased": 599}, "decode: cache fully aliased"),
        ("decode", {"temp": 20}, "decode: temp under 2% of arguments"),
        ("decode", {"all_reduces_per_block": 3}, "decode: at most 2 all-reduces per block"),
        ("decode", {"weight_sized": {"copies": 1}}, "decode: no weight-sized copies"),
        ("decode", {"weight_sized": {"dequantized": 1}}, "decode: no weight-sized dequantized"),
        ("prefill", {"kernels": {}}, "prefill: uses an attention kernel"),
        (
            "prefill",
            {"kernels": {"dot tpu_custom_call": 9}},
            "prefill: uses an attention kernel",
        ),
        ("images", {"temp": 2**30}, "images: temp under 1 GiB"),
        ("prefill", {"error": "RESOURCE_EXHAUSTED", "peak": None}, "prefill: compiles"),
    ],
)
def test_each_check_can_fail(capsys, program, change, check):
    failing = plan(**{program: {**PROGRAM, **change}})
    assert [name for name, passed in passed_checks(failing).items() if not passed] == [check]
    assert print_checks([failing]) == 1 and check in capsys.readouterr().out
    columns, rows = program_table([failing])
    assert len(rows) == 1 and len(rows[0]) == len(columns)


def test_topology_and_formats_of_ones_own(app, tmp_path):
    """Also for a GPU that no compiler knows; there, the figures come from formulas."""
    path = tmp_path / "results.json"
    options = ["--topology", "v6e:1x1", "--quantization", "int8", "--json", str(path)]
    result = runner.invoke(app, [*options, "--method", "arithmetic"])
    assert result.exit_code == 0, result.output
    (plan,) = json.loads(path.read_text())["plans"]
    assert (plan["batch"], plan["max_length"], plan["crops"]) == (8, 4096, 80)
    result = runner.invoke(app, [*options, "--topology", "t4:1", "--kv-cache-dtype", "int8"])
    plans = json.loads(path.read_text())["plans"]
    assert [plan["batch"] for plan in plans] == [1, 1]
    assert plans[1]["kv_cache_dtype"] == "int8" and not plans[1]["programs"]


def test_missing_compilers_are_named(app, monkeypatch):
    """The figures of such a topology come from formulas; the table says how to install one."""
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(aot_compile, "installed_compiler", lambda platform: None)
    result = runner.invoke(app, ["--topology", "h100:1", "--topology", "v6e:1x1"])
    assert result.exit_code == 0, result.output
    assert "'.[cuda12]' or '.[cuda13]'" in result.output and "'.[tpu]'" in result.output
