"""`ovis-jax batch` with the programs that all tests of the engine share."""

import json
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from ovis_jax.batch import command
from ovis_jax.cli import app as cli


@pytest.fixture
def run_batch(ovis, runner, make_scheduler, monkeypatch, tmp_path):
    """Run the command with a file of the given rows; returns its result and the results file."""

    @contextmanager
    def run_engine(_, *, max_num_seqs, max_model_len, **options):
        assert (max_num_seqs, max_model_len) == (runner.max_num_seqs, runner.max_model_len)
        yield make_scheduler(**options)

    monkeypatch.setattr(command, "load", lambda *_, **__: ovis)
    monkeypatch.setattr(command, "run_engine", run_engine)
    sizes = ["--max-num-seqs", runner.max_num_seqs, "--max-model-len", runner.max_model_len]

    def run_batch(rows, *options):
        requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
        if isinstance(rows, list):
            lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
            requests.write_bytes(b"\n".join(lines))
        else:
            requests = rows
        arguments = ["batch", requests, results, *sizes, "--max-new-tokens", 24, *options]
        return CliRunner().invoke(cli, list(map(str, arguments))), results

    return run_batch


@pytest.fixture
def read_lines():
    return lambda path: [json.loads(line) for line in path.read_bytes().splitlines()]
