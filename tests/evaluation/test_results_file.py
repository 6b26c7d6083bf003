"""Results files: any text is read back unchanged, and other files are not overwritten."""

import shutil

import pyarrow as pa
import pytest
from pyarrow import parquet

from ovis_jax.errors import DataError
from ovis_jax.evaluation.questions import read_questions
from ovis_jax.evaluation.results_file import ResultsFile, fingerprint_questions

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


def test_the_fingerprint_of_questions_does_not_depend_on_their_folder(golden, tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        shutil.copy(golden / "images/tiny.png", folder)
        images = [{"bytes": (folder / "tiny.png").read_bytes(), "path": "x.png"}]
        columns = {"question": ["Who?"], "answer": ["I."]}
        parquet.write_table(pa.table({"image": images, **columns}), folder / "q.parquet")
        (folder / "q.jsonl").write_text('{"image": "tiny.png", "question": "Who?", "answer": "I."}')
    for name in ("q.parquet", "q.jsonl"):
        paths = [tmp_path / folder / name for folder in "ab"]
        first, second = (fingerprint_questions(read_questions(path)) for path in paths)
        assert first == second
    no_image = tmp_path / "q.jsonl"
    no_image.write_text('{"question": "Who?", "answer": "I."}')
    assert fingerprint_questions(read_questions(no_image)) != first
