"""A file of results is read as it was written, whatever the answers hold."""

import pytest

from ovis_jax.errors import DataError
from ovis_jax.evaluation.results import Results

HEAD = {"model": "a", "questions": "b"}


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\x85b", "a\nb\r\x0b\x0c\x1cb", "ä"])
def test_answers_that_hold_ends_of_lines(tmp_path, text):
    path = tmp_path / "results.jsonl"
    with Results(path, HEAD) as results:
        results.add({"id": 1, "answer": text})
        results.add({"id": 2, "answer": "b"})
    with Results(path, HEAD) as results:
        assert [result["answer"] for result in results.done] == [text, "b"]


@pytest.mark.parametrize("text", [b"no JSON\n", b"[]\n", b"\xff\n", b'{"a": 1}\n\n'])
def test_other_files_are_left_alone(tmp_path, text):
    path = tmp_path / "results.jsonl"
    path.write_bytes(text)
    with pytest.raises(DataError, match="not a file of results"):
        Results(path, HEAD)
    assert path.read_bytes() == text
