"""The table and checks of the engine's programs, without a compiler."""

import json

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import compile_engine_programs
from benchmarks.compile_engine_programs import FORMATS, passed_checks, program_table
from benchmarks.support.engine_programs import engine_programs
from benchmarks.support.reduced_depth import with_depth
from ovis_jax import presets
from ovis_jax.plan.workload_from_names import make_workload

PROGRAM = {
    "aliased": 600,
    "updated": 600,
    "temp": 2**20,
    "all_reduces_per_block": 2,
    "weight_sized": {"copies": 0, "dequantized": 0, "all-gathers": 0, "all-reduces": 0},
    "compile_seconds": 9.0,
}


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(compile_engine_programs.main)
    return lambda *options: CliRunner().invoke(app, options)


@pytest.mark.parametrize(
    ("name", "change", "check"),
    [
        ("decode full", {"aliased": 599}, "updates in place"),
        ("decode full", {"temp": 2**26}, "temp under 64 MiB"),
        ("prefill_chunks x4", {"temp": 2**30}, "temp under 768 MiB"),
        ("prefill", {"all_reduces_per_block": 3}, "at most 2 all-reduces per block"),
        ("copy_cache", {"weight_sized": {"copies": 1}}, "no weight-sized copies"),
        ("decode full", {"error": "RESOURCE_EXHAUSTED", "peak": None}, "compiles"),
    ],
)
def test_each_check_can_fail(name, change, check):
    assert all(passed_checks(name, PROGRAM).values())
    failed = [x for x, passed in passed_checks(name, {**PROGRAM, **change}).items() if not passed]
    assert failed == [check]


def test_table():
    """A program per row, also if some were not compiled for a topology."""
    same = {**PROGRAM, "format": "int8", "checks": {"compiles": True}}
    results = [
        {**same, "topology": "v5e:2x4", "program": "prefill"},
        {**same, "topology": "h100:1", "program": "prefill", "all_reduces_per_block": 0},
        {**same, "topology": "h100:1", "program": "copy_cache", "checks": {"compiles": False}},
    ]
    columns, rows = program_table(results, ("v5e:2x4", "h100:1"))
    assert columns == ["format", "program", "v5e:2x4", "h100:1"]
    assert rows == [
        ["int8", "prefill", "1 (2)", "1"],
        ["int8", "copy_cache", "", "1 (2) FAILED"],
    ]


def test_missing_compilers_are_named(run, monkeypatch, tmp_path):
    """The programs of the other topologies are still compiled and checked."""
    monkeypatch.setattr(
        compile_engine_programs,
        "installed_compiler",
        lambda platform: "libtpu 1" if platform == "tpu" else None,
    )
    monkeypatch.setattr(
        compile_engine_programs,
        "analyze_engine_programs",
        lambda workload, rank, names: ((name, PROGRAM) for name in names),
    )
    path = tmp_path / "results.json"
    result = run("--topology", "h100:1", "--topology", "v6e:1x1", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert "h100:1: not compiled" in result.output and "'.[cuda12]'" in result.output
    programs = json.loads(path.read_text())["programs"]
    assert {x["topology"] for x in programs} == {"v6e:1x1"}
    assert len(programs) == sum(len(one.programs) for one in FORMATS)


def test_failed_checks_are_named(run, monkeypatch):
    monkeypatch.setattr(compile_engine_programs, "installed_compiler", lambda platform: "libtpu 1")
    monkeypatch.setattr(
        compile_engine_programs,
        "analyze_engine_programs",
        lambda workload, rank, names: ((name, {**PROGRAM, "temp": 2**40}) for name in names),
    )
    result = run("--topology", "v6e:1x1", "--program", "copy_cache")
    assert result.exit_code == 1
    assert "v6e:1x1, bfloat16, copy_cache: FAILED temp under 64 MiB" in result.output


def test_every_format_names_programs_that_exist():
    config = with_depth(presets.ovis1_6_gemma2_9b(), 2)
    assert (config.decoder.depth, config.vision.depth) == (2, 2)
    workload = make_workload(config, "v5e:2x4", 8, 4096)
    programs = engine_programs(workload, workload.abstract_mesh)
    assert {name for one in FORMATS for name in one.programs} <= programs.keys()
