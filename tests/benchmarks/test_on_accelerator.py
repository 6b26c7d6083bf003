"""The accelerator check: its rehearsal, and what it does when a case or a part fails."""

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

from benchmarks import on_accelerator
from benchmarks.support.accelerator import correctness, facts
from benchmarks.support.accelerator.part_process import Part, run_part
from benchmarks.support.accelerator.report import speed_tables, write_report
from benchmarks.support.accelerator.results import CaseRunner, read_results
from benchmarks.support.accelerator.settings import Settings

ROOT = Path(__file__).parents[2]
BARE_MACHINE = """
import sys
from importlib.machinery import PathFinder

HIDDEN = ("typer", "tokamax", *{more})


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)


def refuse_network(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise OSError(f"this test allows no network: {{event}} {{arguments}}")


sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
sys.addaudithook(refuse_network)
"""
"""A `sitecustomize` module that hides optional packages, and refuses every connection."""
HAS_TORCH = find_spec("torch") is not None and find_spec("transformers") is not None


def run_on_bare_machine(tmp_path: Path, *command: str, hide: tuple[str, ...] = ()):
    """Run Python without optional packages and without network."""
    (tmp_path / "sitecustomize.py").write_text(BARE_MACHINE.format(more=hide))
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_rehearsal_runs_every_part(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("out")
    options = ["--rehearse", "--minutes", "600", "--out"]  # a busy machine may be slow
    command = ["-m", "benchmarks.on_accelerator", *options, str(tmp_path)]
    done = run_on_bare_machine(tmp_path_factory.mktemp("site"), *command)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(part["part"], part["status"]) for part in report["parts"]] == [
        (part.name, "finished") for part in on_accelerator.PARTS
    ]
    omitted = {x["case"]: x["reason"] for x in report["results"] if x["status"] == "omitted"}
    expected = {
        f"kernel {kernel}, {dtype}": f"{kernel} cannot run on cpu: it is a kernel for {kind}s"
        for kernel, kind in (("splash", "TPU"), ("tokamax", "GPU"))
        for dtype in ("float32", "bfloat16")
    }
    if not HAS_TORCH:
        expected["PyTorch"] = "not installed: torch, transformers"
    assert omitted == expected
    measured = {(x["part"], x["case"]) for x in report["results"] if x["status"] == "measured"}
    cases = CASES if HAS_TORCH else {name: CASES[name] for name in CASES if name != "torch"}
    assert measured == {(part, case) for part, names in cases.items() for case in names}
    compared = [x for x in report["results"] if x["part"] == "correctness" and "passed" in x]
    assert len(compared) == len(CASES["correctness"]) and all(x["passed"] for x in compared)
    text = (tmp_path / "report.md").read_text()
    assert all(
        f"| {case} |" in text
        for part, case in measured
        if part in ("speed", "engine", "correctness")
    )
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [
        "log.txt",
        "report.json",
        "report.md",
        "results.jsonl",
        "roofline.png",
        "tokens_per_second.png",
        "trace_decode.xplane.pb",
        "trace_prefill.xplane.pb",
    ]


@pytest.mark.slow
def test_every_part_imports_without_optional_packages(tmp_path):
    modules = [part.module for part in on_accelerator.PARTS]
    code = f"import {', '.join(modules)}, sys; print(sorted(sys.modules))"
    hidden = ("pydantic", "torch", "transformers", "matplotlib")
    done = run_on_bare_machine(tmp_path, "-c", code, hide=hidden)
    assert done.returncode == 0, done.stderr
    assert not {"typer", *hidden}.intersection(ast.literal_eval(done.stdout))


CASES = {
    "facts": {
        "devices",
        "host",
        "copy",
        *(f"matrix product, {dtype}" for dtype in ("bfloat16", "int8", "float32")),
    },
    "correctness": {
        "demo answers, float32",
        "demo answers, bfloat16",
        "engine against generate",
        "kernel plain, bfloat16",
        "kernel blockwise, bfloat16",
        "kernel blockwise, float32",
        "golden tiny-bf16-sharded multi_turn.bf16, bfloat16",
        "golden tiny-bf16-sharded multi_turn.f32, float32",
        "golden tiny-f32 batch_leftpad, float32",
    },
    "speed": {
        "random weights",
        *(f"decode, {rows} row(s)" for rows in (1, 2)),
        "prompt of 24 positions",
        "vision encoder, 1 crop(s)",
        "visual embeddings, 1 crop(s)",
        "generate, 1 row(s)",
    },
    "torch": {
        "PyTorch",
        *(f"decode, {rows} row(s), {mode}" for rows in (1, 2) for mode in ("dynamic", "eager")),
        "vision encoder, 1 crop(s)",
        "prompt of 24 positions, eager",
    },
    "engine": {
        "engine, start",
        *(f"engine, {number} request(s)" for number in (1, 4)),
        "LoRA training step",
    },
    "profile": {"decode", "prefill"},
}


def make_part(tmp_path: Path, name: str, body: str, seconds: float = 600) -> Part:
    """A part whose module is written into the test's folder."""
    (tmp_path / f"{name}.py").write_text(f"def run(settings, cases):\n    {body}\n")
    return Part(name, name, name, seconds, (("PYTHONPATH", f"{tmp_path}:{ROOT}"),))


def run_one(tmp_path: Path, part: Part, **options) -> dict:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    ended = run_part(part, Settings(part.name, out, True, part.seconds), tmp_path, **options)
    write_report(out, [ended], {part.name: part.title}, [])
    return ended


@pytest.mark.slow
def test_a_part_that_raises_is_recorded_with_the_cases_before(tmp_path):
    body = "cases.run('first', lambda: {'x': 1}); raise ValueError('broken on purpose')"
    ended = run_one(tmp_path, make_part(tmp_path, "facts", body))
    assert (ended["status"], ended["exit_code"]) == ("crashed", 1)
    (result,) = read_results(tmp_path / "out" / "results.jsonl")
    assert (result["case"], result["status"], result["x"]) == ("first", "measured", 1)
    assert "ValueError: broken on purpose" in (tmp_path / "out" / "log.txt").read_text()
    assert "The part crashed (exit code 1)." in (tmp_path / "out" / "report.md").read_text()


def test_the_report_says_which_stage_was_too_short_to_time():
    """`generate` is timed as the difference of two calls, which noise can make negative."""
    result = {"part": "speed", "case": "generate", "status": "measured", "step": {"median": -1e-6}}
    assert "| generate | too short to time |  |" in "\n".join(speed_tables([result]))


@pytest.mark.parametrize("case", ["devices", "host"])
def test_the_report_is_written_when_a_fact_is_missing(tmp_path, case):
    cases = CaseRunner(tmp_path / "results.jsonl", "facts", float("inf"))
    measured = {
        "devices": facts.describe_devices_and_memory,
        "host": lambda: facts.describe_host_and_packages(Settings("facts", tmp_path, True, 1.0)),
    }
    for name, measure in measured.items():
        cases.run(name, (lambda: raise_error(OSError("gone"))) if name == case else measure)
    ended = {"part": "facts", "status": "finished", "exit_code": 0, "seconds": 1.0}
    write_report(tmp_path, [ended], {"facts": "The device"}, read_results(cases.path))
    text = (tmp_path / "report.md").read_text()
    assert f"- {case}: failed, OSError: gone" in text
    assert ("| devices |" in text, "| versions |" in text) == (case == "host", case == "devices")


@pytest.mark.slow
def test_a_part_that_hangs_is_killed(tmp_path):
    part = make_part(tmp_path, "facts", "import threading; threading.Event().wait()", seconds=0.1)
    ended = run_one(tmp_path, part, grace_seconds=0.1)
    assert (ended["status"], ended["exit_code"]) == ("timed out", -9)


@pytest.mark.slow
def test_a_failed_part_leaves_the_others_running(tmp_path, capsys):
    parts = (
        make_part(tmp_path, "facts", "cases.run('device', lambda: {'platform': 'gpu'})"),
        make_part(tmp_path, "speed", "raise SystemExit(3)"),
        make_part(tmp_path, "profile", "cases.omit('decode', 'no reason')"),
    )
    assert on_accelerator.check_accelerator(tmp_path / "out", rehearse=True, parts=parts) == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [part["status"] for part in report["parts"]] == ["finished", "crashed", "finished"]
    assert "- decode: omitted, no reason" in capsys.readouterr().out


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results.jsonl"


def raise_error(error: BaseException):
    raise error


def test_out_of_memory_is_recorded_and_the_next_case_runs(results):
    cases = CaseRunner(results, "speed", float("inf"))
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
    assert cases.run("large", lambda: raise_error(error)) is None
    assert cases.run("small", lambda: {"x": 2}) == {"x": 2}
    large, small = read_results(results)
    assert large["status"] == "failed"
    assert large["reason"] == (
        "out of memory (JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes)"
    )
    assert (small["status"], small["x"]) == ("measured", 2)


def test_no_case_starts_after_the_deadline(results):
    CaseRunner(results, "speed", float("-inf")).run("late", lambda: raise_error(AssertionError()))
    (result,) = read_results(results)
    assert (result["status"], result["reason"]) == ("omitted", "no time left")


def test_a_case_that_needs_more_memory_than_there_is_is_omitted(results):
    cases = CaseRunner(results, "speed", float("inf"), memory_bytes=2**30)
    cases.run("large", lambda: raise_error(AssertionError()), needed_bytes=2**31)
    (result,) = read_results(results)
    assert result["reason"] == "needs 2.0 GiB of memory, the device has 1.0 GiB"


def test_only_an_expected_missing_package_omits_a_case(results):
    cases = CaseRunner(results, "speed", float("inf"))
    error = ModuleNotFoundError("No module named 'pydantic'", name="pydantic.types")
    cases.run("training", lambda: raise_error(error), requires=("pydantic",))
    cases.run("decode", lambda: raise_error(error))
    training, decode = read_results(results)
    assert training["reason"] == "the package pydantic.types is not installed"
    assert (decode["status"], decode["reason"]) == (
        "failed",
        "ModuleNotFoundError: No module named 'pydantic'",
    )


def test_a_line_that_was_cut_off_is_not_read(results):
    CaseRunner(results, "speed", float("inf")).omit("first", "no reason")
    with results.open("a") as file:
        file.write('{"part": "speed", "ca')
    CaseRunner(results, "profile", float("inf")).omit("second", "no reason")
    assert [x["case"] for x in read_results(results)] == ["first", "second"]


def test_a_case_whose_process_ended_counts_as_failed(results):
    with pytest.raises(KeyboardInterrupt):
        CaseRunner(results, "speed", float("inf")).run(
            "first", lambda: raise_error(KeyboardInterrupt())
        )
    (result,) = read_results(results)
    assert (result["status"], result["reason"]) == ("failed", "the process ended during this case")


def test_nan_from_a_kernel_fails(monkeypatch):
    differences = iter([0.0, float("nan"), 0.0])
    monkeypatch.setattr(correctness, "_kernel_difference", lambda *_: next(differences))
    settings = Settings("correctness", Path(), True, 1.0)
    result = correctness.compare_kernel(settings, "blockwise", "float32")
    assert not result["passed"] and result["difference"] != result["difference"]


@pytest.mark.slow
def test_without_an_accelerator_it_says_how_to_rehearse(tmp_path, capsys):
    part = make_part(tmp_path, "facts", "cases.run('device', lambda: {'platform': 'cpu'})")
    assert on_accelerator.check_accelerator(tmp_path / "out", parts=(part,)) == 2
    error = capsys.readouterr().err
    assert "JAX runs on the CPU" in error and "--rehearse" in error


def test_only_the_chosen_parts_run_after_the_facts(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        on_accelerator,
        "check_accelerator",
        lambda out, **options: seen.extend(part.name for part in options["parts"]),
    )
    arguments = ["--out", str(tmp_path), "--parts", "profile", "torch"]
    monkeypatch.setattr(sys, "argv", ["on_accelerator", *arguments])
    with pytest.raises(SystemExit):
        on_accelerator.main()
    assert seen == ["facts", "torch", "profile"]


@pytest.mark.slow
def test_without_jax_it_says_where_to_look(tmp_path, capsys):
    part = make_part(tmp_path, "facts", "raise RuntimeError('no device')")
    assert on_accelerator.check_accelerator(tmp_path / "out", parts=(part,)) == 2
    assert "JAX could not start; see log.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--minutes", "0"], "--minutes is 0.0, expected more than 0"),
        (["--out", "."], "--out . exists and is not an empty folder"),
    ],
)
def test_bad_options(arguments, problem, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["on_accelerator", *arguments])
    with pytest.raises(SystemExit, match="2"):
        on_accelerator.main()
    assert problem in capsys.readouterr().err
