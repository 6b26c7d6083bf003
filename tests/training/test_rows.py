"""Dataset files: what is read, and what is said of rows that cannot be."""

import json

import pytest

from ovis_jax.errors import DataError
from ovis_jax.training.rows import read_rows

ASKED = {"from": "human", "value": "<image>\nWhat is it?"}
TOLD = {"from": "gpt", "value": "A dot."}
GOOD = {"id": "1", "image": "dot.png", "kind": "what", "conversations": [ASKED, TOLD]}
PAIR = {"image": ["dot.png"], "prompt": "<image>\nWhat?", "chosen": "A dot.", "rejected": "No."}


def write(path, *rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text(text)
    return [path]


def test_both_layouts_and_both_forms(tmp_path):
    (lines,) = write(tmp_path / "a.jsonl", GOOD, "", PAIR)
    (listed,) = write(tmp_path / "b.json", json.dumps([GOOD, PAIR], indent=1))
    for path in (lines, listed):
        found = read_rows([path])
        assert not found.faults
        conversation, pair = found.rows
        assert conversation.images == (str(tmp_path / "dot.png"),)
        assert conversation.turns == (
            {"role": "user", "content": ASKED["value"]},
            {"role": "assistant", "content": TOLD["value"]},
        )
        assert conversation.kind == "what" and conversation.answers is None
        assert pair.answers == ("A dot.", "No.")
        assert [t["content"] for t in pair.conversation("No.")] == [PAIR["prompt"], "No."]
    assert len(read_rows([lines, listed]).rows) == 4


def test_a_line_ends_where_json_lines_do(tmp_path):
    told = TOLD | {"value": "A\u2028dot\u2029or\x85so."}
    row = json.dumps(GOOD | {"conversations": [ASKED, told]}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(f"{row}\r\n{row}\n".encode())
    found = read_rows([tmp_path / "a.jsonl"])
    assert not found.faults and len(found.rows) == 2
    assert found.rows[0].turns[1]["content"] == told["value"]


def test_text_alone(tmp_path):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    (row,) = read_rows(write(tmp_path / "a.jsonl", {"conversations": turns})).rows
    assert row.images == () and row.open_images() == []


@pytest.mark.parametrize(
    "row, complaint",
    [
        ("{", "not JSON"),
        ([], "a list, expected an object"),
        ({"image": "dot.png"}, "expected conversations, or prompt, chosen and rejected"),
        (GOOD | {"conversations": [ASKED]}, "no turn from gpt holds an answer"),
        (GOOD | {"conversations": [ASKED, TOLD | {"value": " "}]}, "no turn from gpt holds"),
        (GOOD | {"conversations": []}, "expected a list of turns"),
        (GOOD | {"conversations": [ASKED, TOLD | {"from": "system"}]}, "expected human or gpt"),
        (GOOD | {"conversations": [ASKED, {"from": "gpt", "value": 3}]}, "both texts"),
        (GOOD | {"image": ["dot.png", "line.png"]}, "1 times <image> and 2 images"),
        (GOOD | {"image": None}, "1 times <image> and 0 images"),
        (GOOD | {"image": [3]}, "expected a path or a list of paths"),
        (PAIR | {"rejected": ""}, "rejected is ''"),
    ],
)
def test_a_bad_row_is_named_and_the_others_stay(tmp_path, row, complaint):
    found = read_rows(write(tmp_path / "a.jsonl", GOOD, row, PAIR))
    assert len(found.rows) == 2
    (fault,) = found.faults
    assert fault.startswith(f"{tmp_path / 'a.jsonl'}: row 2: ") and complaint in fault


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        read_rows([tmp_path / "none.json"])
    with pytest.raises(DataError, match=r"a\.json is not a JSON list"):
        read_rows(write(tmp_path / "a.json", "[{"))
    with pytest.raises(DataError, match=r"a\.json: no rows"):
        read_rows(write(tmp_path / "a.json", "[]"))


def test_an_image_is_opened_late_and_named(tmp_path):
    (row,) = read_rows(write(tmp_path / "a.jsonl", GOOD)).rows
    with pytest.raises(DataError, match=r"a\.jsonl: row 1: .*dot\.png"):
        row.open_images()


def test_a_prompt_may_be_turns(tmp_path):
    turns = [
        {"from": "human", "value": "Who?"},
        {"from": "gpt", "value": "A dot."},
        {"from": "human", "value": "Where?"},
    ]
    pair = {"chosen": "Left.", "rejected": "It is on the left."}
    path = tmp_path / "pairs.jsonl"
    lines = [{"prompt": turns, **pair}, {"prompt": turns[:2], **pair}, {"prompt": [], **pair}]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = read_rows([path])
    (row,) = found.rows
    assert [turn["content"] for turn in row.turns] == ["Who?", "A dot.", "Where?"]
    assert row.answers == ("Left.", "It is on the left.")
    assert "row 2: the last turn of prompt is from gpt" in found.faults[0]
    assert "row 3: prompt is [], expected a list of turns" in found.faults[1]
