"""Dataset files: both layouts, both kinds of rows, and messages about invalid rows."""

import json

import pytest

from ovis_jax.errors import DataError
from ovis_jax.inputs.dataset import read_dataset

QUESTION = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "A dot."}
VALID = {"id": "1", "image": "dot.png", "kind": "what", "conversations": [QUESTION, ANSWER]}
PAIR = {"image": ["dot.png"], "prompt": "<image>\nWhat?", "chosen": "A dot.", "rejected": "No."}


def write(path, *rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text(text)
    return [path]


def test_both_layouts_and_both_kinds_of_rows(tmp_path):
    (json_lines,) = write(tmp_path / "a.jsonl", VALID, "", PAIR)
    (json_list,) = write(tmp_path / "b.json", json.dumps([VALID, PAIR], indent=1))
    for path in (json_lines, json_list):
        dataset = read_dataset([path])
        assert not dataset.errors
        conversation, pair = dataset.rows
        assert conversation.image_paths == (str(tmp_path / "dot.png"),)
        assert conversation.turns == (
            {"role": "user", "content": QUESTION["value"]},
            {"role": "assistant", "content": ANSWER["value"]},
        )
        assert conversation.kind == "what" and conversation.preference is None
        assert pair.preference == ("A dot.", "No.")
        assert [turn["content"] for turn in pair.turns_with("No.")] == [PAIR["prompt"], "No."]
    assert len(read_dataset([json_lines, json_list]).rows) == 4


def test_unicode_line_separators_in_texts(tmp_path):
    answer = ANSWER | {"value": "A\u2028dot\u2029or\x85so."}
    row = json.dumps(VALID | {"conversations": [QUESTION, answer]}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(f"{row}\r\n{row}\n".encode())
    dataset = read_dataset([tmp_path / "a.jsonl"])
    assert not dataset.errors and len(dataset.rows) == 2
    assert dataset.rows[0].turns[1]["content"] == answer["value"]


def test_row_without_an_image(tmp_path):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    (row,) = read_dataset(write(tmp_path / "a.jsonl", {"conversations": turns})).rows
    assert row.image_paths == () and row.open_images() == []


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "not JSON"),
        ([], "the row has type list, expected an object"),
        ({"image": "dot.png"}, "expected conversations, or prompt, chosen and rejected"),
        (VALID | {"conversations": [QUESTION]}, "no turn from gpt has an answer"),
        (VALID | {"conversations": [QUESTION, ANSWER | {"value": " "}]}, "no turn from gpt has"),
        (VALID | {"conversations": []}, "conversations is [], expected a list of turns"),
        (VALID | {"conversations": [QUESTION, ANSWER | {"from": "system"}]}, "'system'"),
        (VALID | {"conversations": [QUESTION, {"from": "gpt", "value": 3}]}, "turn 2 of"),
        (VALID | {"image": ["dot.png", "line.png"]}, "<image> 1 times and the row has 2 images"),
        (VALID | {"image": None}, "<image> 1 times and the row has 0 images"),
        (VALID | {"image": [3]}, "image is [3], expected a path or a list of paths"),
        (PAIR | {"rejected": ""}, "rejected is ''"),
    ],
)
def test_invalid_rows_are_reported_and_valid_ones_kept(tmp_path, row, message):
    dataset = read_dataset(write(tmp_path / "a.jsonl", VALID, row, PAIR))
    assert len(dataset.rows) == 2
    (error,) = dataset.errors
    assert error.startswith(f"{tmp_path / 'a.jsonl'}: row 2: ") and message in error


def test_invalid_files(tmp_path):
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        read_dataset([tmp_path / "none.json"])
    with pytest.raises(DataError, match=r"a\.json is not a JSON list"):
        read_dataset(write(tmp_path / "a.json", "[{"))
    with pytest.raises(DataError, match=r"a\.json: no rows"):
        read_dataset(write(tmp_path / "a.json", "[]"))


def test_images_are_opened_on_use(tmp_path):
    (row,) = read_dataset(write(tmp_path / "a.jsonl", VALID)).rows
    with pytest.raises(DataError, match=r"a\.jsonl: row 1: .*dot\.png"):
        row.open_images()


def test_prompt_of_several_turns(tmp_path):
    turns = [
        {"from": "human", "value": "Who?"},
        {"from": "gpt", "value": "A dot."},
        {"from": "human", "value": "Where?"},
    ]
    pair = {"chosen": "Left.", "rejected": "It is on the left."}
    rows = [{"prompt": turns, **pair}, {"prompt": turns[:2], **pair}, {"prompt": [], **pair}]
    dataset = read_dataset(write(tmp_path / "pairs.jsonl", *rows))
    (row,) = dataset.rows
    assert [turn["content"] for turn in row.turns] == ["Who?", "A dot.", "Where?"]
    assert row.preference == ("Left.", "It is on the left.")
    assert "row 2: the last turn of prompt is from gpt" in dataset.errors[0]
    assert "row 3: prompt is [], expected a list of turns" in dataset.errors[1]
