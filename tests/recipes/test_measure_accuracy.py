"""Answers are matched with the lines of the test file, even if a text contains U+2028."""

import json
from types import SimpleNamespace

import numpy as np

from ovis_jax.evaluation.batch_answering import ScoredAnswer
from recipes.ovis_tiny import measure_accuracy


def test_lines_end_where_json_lines_do(tmp_path, monkeypatch):
    def answer_rows(*arguments, **_):
        return (ScoredAnswer(row, "A\u2028dot.", "A dot.", np.zeros(1)) for row in arguments[-1])

    monkeypatch.setattr(measure_accuracy, "answer_rows", answer_rows)
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "A\u2028dot."}]
    lines = [{"id": number, "conversations": turns} for number in range(3)]
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    ovis = SimpleNamespace(processor=None, model=None, params=None)
    found = list(measure_accuracy.answer_test_questions(ovis, path))
    assert [line["id"] for _, line in found] == [0, 1, 2]
    assert [answer.row.name for answer, _ in found] == [f"{path}: row {n}" for n in (1, 2, 3)]
