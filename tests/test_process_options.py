"""Options for several processes, and how a process ends after an error."""

import os

import jax
import pytest
import typer

from ovis_jax import process_options
from ovis_jax.errors import DataError, OvisError
from ovis_jax.process_options import run_in_processes

TWO = (False, "localhost:1234", 2, 1)


class Ended(BaseException):
    pass


@pytest.fixture
def joined(monkeypatch):
    """The processes that are joined: nothing is started, and `os._exit` raises `Ended`."""
    calls = []

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(process_options, "initialize_distributed", lambda *a: calls.append(a))
    monkeypatch.setattr(process_options, "initialize_from_environment", lambda: calls.append(()))
    monkeypatch.setattr(os, "_exit", end)
    return calls


@pytest.mark.parametrize(
    "options, expected",
    [
        ((False, None, None, None), []),
        (TWO, [("localhost:1234", 2, 1)]),
        ((True, None, None, None), [()]),
    ],
)
def test_options(joined, options, expected):
    with run_in_processes(*options):
        assert joined == expected


@pytest.mark.parametrize(
    "options", [(True, "localhost:1234", 2, 1), (False, None, 2, None), (True, None, None, 0)]
)
def test_contradictory_options(joined, options):
    with pytest.raises(OvisError, match="either --distributed alone, or --coordinator"):
        with run_in_processes(*options):
            pass
    assert not joined


@pytest.mark.parametrize(
    "error, code, message",
    [
        (DataError("row 3 is broken"), 2, "error: row 3 is broken"),
        (OSError(28, "No space left", "run"), 3, "error: No space left: run"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("a fault"), 1, "ZeroDivisionError: a fault"),
        (
            jax.errors.JaxRuntimeError("UNKNOWN: reset by peer\nmore"),
            1,
            "process 0: an operation with the other processes failed. One of them has probably",
        ),
    ],
)
def test_error_in_this_process_alone_ends_it_at_once(joined, capsys, error, code, message):
    with pytest.raises(Ended) as ended, run_in_processes(*TWO):
        raise error
    assert ended.value.args == (code,)
    assert message in capsys.readouterr().err


def test_error_that_all_processes_have_ends_the_command(joined, monkeypatch, capsys):
    monkeypatch.setattr(process_options, "is_agreed", lambda error: isinstance(error, DataError))
    with pytest.raises(SystemExit) as ended, run_in_processes(*TWO):
        raise DataError("row 3 is broken")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: row 3 is broken\n"


def test_one_process_raises_as_usual(joined):
    with pytest.raises(typer.Exit), run_in_processes(False, None, None, None):
        raise typer.Exit(4)
