"""Results files: any text is read back unchanged, and other files are not overwritten."""

import pytest

from ovis_jax.errors import DataError
from ovis_jax.evaluation.results_file import ResultsFile

HEADER = {"model": "a", "questions": "b"}


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\x85b", "a\nb\r\x0b\x0c\x1cb", "ä"])
def test_line_separators_in_answers(tmp_path, text):
    path = tmp_path / "results.jsonl"
    with ResultsFile(path, HEADER) as file:
        file.add({"id": 1, "answer": text})
        file.add({"id": 2, "answer": "b"})
    with ResultsFile(path, HEADER) as file:
        assert [result["answer"] for result in file.results] == [text, "b"]


@pytest.mark.parametrize("text", [b"no JSON\n", b"[]\n", b"\xff\n", b'{"a": 1}\n\n'])
def test_other_files_are_not_overwritten(tmp_path, text):
    path = tmp_path / "results.jsonl"
    path.write_bytes(text)
    with pytest.raises(DataError, match=rf"{path} is not a results file"):
        ResultsFile(path, HEADER)
    assert path.read_bytes() == text
