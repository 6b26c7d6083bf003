"""Agreement between processes, which are simulated."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from ovis_jax.errors import DataError, OvisError
from ovis_jax.process_agreement import MAX_TEXT_BYTES, agree, is_agreed


@pytest.fixture
def others(monkeypatch):
    """Texts of two other processes; what this process, the first one, reports is added."""
    texts: list[str] = []

    def gather(data):
        rows = [np.frombuffer(x.encode().ljust(MAX_TEXT_BYTES, b"\0"), np.uint8) for x in texts]
        return np.stack([data, *rows])

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    return texts


def report(values, error=None):
    with agree("step 7") as found:
        found.update(values)
        if error:
            raise error


def test_equal_values(others):
    others += ["rows 1a"] * 2
    report({"rows": "1a"})


def test_different_values(others):
    others += ["shape [2, 8]\nrows 1a", "shape [2, 8]\nrows 2b"]
    with pytest.raises(OvisError) as caught:
        report({"shape": "[2, 8]", "rows": "1a"})
    message = "step 7: rows 1a in process 0, 1; rows 2b in process 2. All processes need the same"
    assert str(caught.value).startswith(message) and is_agreed(caught.value)


def test_error_in_another_process(others):
    others += ["error: row 3 is broken", "rows 1a"]
    with pytest.raises(OvisError, match="^process 1: row 3 is broken") as caught:
        report({"rows": "1a"})
    assert is_agreed(caught.value)


def test_error_in_this_process(others):
    others += ["rows 1a"] * 2
    with pytest.raises(DataError, match="broken") as caught:
        report({}, DataError("row 3 is broken " * MAX_TEXT_BYTES))
    assert is_agreed(caught.value)


def test_another_exception_is_not_agreed(others):
    with pytest.raises(ZeroDivisionError) as caught:
        report({}, ZeroDivisionError())
    assert not is_agreed(caught.value)


def test_one_process_checks_nothing():
    report({"rows": "1a"})
    with pytest.raises(DataError) as caught:
        report({}, DataError("broken"))
    assert not is_agreed(caught.value)
