"""Dataset files: layouts, spellings, both kinds of rows, and messages about invalid rows."""

import base64
import io
import json

import pytest
from PIL import Image

from ovis_jax.errors import DataError
from ovis_jax.inputs.dataset import METADATA_KEYS, read_dataset

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
        assert conversation.images == (str(tmp_path / "dot.png"),)
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
    assert row.images == () and row.open_images() == []


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "not JSON"),
        ([], "the row has type list, expected an object"),
        (
            {"image": "dot.png"},
            "the keys are ['image'], expected either conversations or messages, or prompt, chosen",
        ),
        (VALID | {"conversations": [QUESTION]}, "no turn from gpt has an answer"),
        (VALID | {"conversations": [QUESTION, ANSWER | {"value": " "}]}, "no turn from gpt has"),
        (VALID | {"conversations": []}, "conversations is [], expected a list of turns"),
        (
            VALID | {"conversations": [QUESTION, ANSWER | {"from": "tool"}]},
            "turn 2 of conversations: the role is 'tool', expected one of human, user, gpt",
        ),
        (
            VALID | {"conversations": [QUESTION, ANSWER, {"from": "system", "value": "Be brief."}]},
            "conversations has no turn from human that follows the system prompt",
        ),
        (VALID | {"conversations": [QUESTION, {"from": "gpt", "value": 3}]}, "turn 2 of"),
        (VALID | {"image": ["dot.png", "line.png"]}, "<image> 1 times and the row has 2 images"),
        (VALID | {"image": None}, "<image> 1 times and the row has 0 images"),
        (VALID | {"image": [3]}, "image[0] is 3, expected a path or a data: URL"),
        (VALID | {"images": ["dot.png"]}, "image and images both have a value"),
        (VALID | {"image": "https://a/b.png"}, "image is 'https://a/b.png'; images are not"),
        (VALID | {"video": "a.mp4"}, "the key 'video' is unknown, expected image, images"),
        (VALID | {"imgae": "a.png"}, "the key 'imgae' is unknown, expected image, images"),
        (VALID | {"tools": [{"type": "function"}]}, "the key 'tools' is unknown"),
        (VALID | {"messages": [QUESTION, ANSWER]}, "expected either conversations or messages"),
        (VALID | {"chosen": "A dot.", "rejected": "No."}, "the last turn of conversations is from"),
        (PAIR | {"chosen": [ANSWER, ANSWER]}, "expected a text or one turn of the assistant"),
        (VALID | {"system": 3}, "system is 3, expected a non-empty string"),
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


USER, ASSISTANT = ("user", "<image>\nWhat is it?"), ("assistant", "A dot.")
PICTURE = {"type": "image_url", "image_url": {"url": "dot.png", "detail": "high"}}
TEXT = {"type": "text", "text": "What is it?"}


def messages(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def openai(*parts):
    return {"messages": messages(list(parts), "A dot.")}


def data_url():
    file = io.BytesIO()
    Image.new("RGB", (2, 1), "red").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


SPELLINGS = {
    "LLaVA": {"image": "dot.png", "conversations": [QUESTION, ANSWER]},
    "no mark": {"image": "dot.png", "messages": messages("What is it?", "A dot.")},
    "images": {"images": ["dot.png"], "conversations": [QUESTION, ANSWER]},
    "one of images": {"images": "dot.png", "conversations": [QUESTION, ANSWER]},
    "path in an object": {
        "images": [{"bytes": None, "path": "dot.png"}],
        "conversations": [QUESTION, ANSWER],
    },
    "ShareGPT with user": {
        "image": "dot.png",
        "conversations": [QUESTION | {"from": "user"}, ANSWER | {"from": "assistant"}],
    },
    "OpenAI": {"image": "dot.png", "messages": messages(USER[1], "A dot.")},
    "OpenAI's parts": openai(PICTURE, TEXT),
    "text first": openai(TEXT, PICTURE),
    "plain image_url": openai({"type": "image_url", "image_url": "dot.png"}, TEXT),
    "part with an image": openai({"type": "image", "image": "dot.png", "text": None}, TEXT),
    "part with a path": openai({"type": "image", "path": "dot.png"}, TEXT),
    "part of images": {"images": ["dot.png"], **openai({"type": "image"}, TEXT)},
    "parts of Hugging Face's datasets": {
        "images": ["dot.png"],
        **openai(
            {"type": "image", "index": 0, "text": ""},
            {"type": "text", "index": None, "text": "What is it?", "image": ""},
        ),
    },
    "metadata": dict.fromkeys(METADATA_KEYS, 1)
    | {"image": "dot.png", "conversations": [QUESTION | {"id": 3, "name": "x"}, ANSWER]},
    "empty keys": {
        "image": "dot.png",
        "messages": None,
        "system": "",
        "tools": [],
        "videos": None,
        "conversations": [QUESTION | {"tool_calls": None}, ANSWER | {"weight": None}],
    },
    "weights of one": {
        "image": "dot.png",
        "conversations": [QUESTION, ANSWER | {"weight": 1.0, "loss": True, "train": 1}],
    },
}


@pytest.mark.parametrize("row", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings_of_the_same_row(tmp_path, row):
    dataset = read_dataset(write(tmp_path / "a.jsonl", row))
    assert dataset.errors == ()
    assert dataset.rows[0].images == (str(tmp_path / "dot.png"),)
    assert [(turn["role"], turn["content"]) for turn in dataset.rows[0].turns] == [USER, ASSISTANT]
    assert all(turn.keys() == {"role", "content"} for turn in dataset.rows[0].turns)


def test_images_of_parts_and_of_the_row_keep_their_order(tmp_path):
    own = {"type": "image", "image": "own.png"}
    content = [{"type": "image"}, {"type": "text", "text": "and"}, own, TEXT, {"type": "image"}]
    row = {"images": ["a.png", "b.png"], "messages": messages(content, "A dot.")}
    (found,) = read_dataset(write(tmp_path / "a.jsonl", row)).rows
    assert found.turns[0]["content"] == "<image>\nand\n<image>\nWhat is it?\n<image>"
    assert found.images == tuple(str(tmp_path / name) for name in ("a.png", "own.png", "b.png"))
    row["images"] = ["a.png"]
    (error,) = read_dataset(write(tmp_path / "a.jsonl", row)).errors
    assert "row 1: the texts contain <image> 2 times and the row has 1 images" in error


@pytest.mark.parametrize("indices", [(1, 0), (0, 0), ("0", 1)])
def test_parts_that_take_the_images_of_the_row_in_another_order(tmp_path, indices):
    parts = [{"type": "image", "index": index} for index in indices]
    row = {"images": ["a.png", "b.png"], **openai(*parts, TEXT)}
    (error,) = read_dataset(write(tmp_path / "a.jsonl", row)).errors
    expected = 0 if indices[0] != 0 else 1
    found = f"the index {indices[expected]!r}, expected {expected}: the parts take"
    assert f"row 1: a part of messages has {found}" in error


@pytest.mark.parametrize("form", ["key", "turn", "developer"])
@pytest.mark.parametrize("question", ["<image>\nWhat is it?", "What is it?"])
def test_system_prompts_are_prepended_to_the_next_user_turn(tmp_path, form, question):
    """The server puts images before the system prompt, too."""
    turns = messages(question, "A dot.")
    row = {"image": "dot.png", "messages": turns}
    if form == "key":
        row["system"] = "Be brief."
    else:
        role = "system" if form == "turn" else "developer"
        turns.insert(0, {"role": role, "content": "Be brief."})
    (found,) = read_dataset(write(tmp_path / "a.jsonl", row)).rows
    assert [turn["content"] for turn in found.turns] == [
        "<image>\nBe brief.\n\nWhat is it?",
        "A dot.",
    ]


@pytest.mark.parametrize("value", [{"loss": False}, {"weight": 0}, {"train": 0.0}])
def test_turns_without_loss(tmp_path, value):
    turns = [QUESTION, ANSWER | value, {"from": "human", "value": "Sure?"}, ANSWER]
    row = {"image": "dot.png", "conversations": turns}
    only = {"image": "dot.png", "conversations": turns[:2]}
    dataset = read_dataset(write(tmp_path / "a.jsonl", row, only))
    assert [turn.get("loss", True) for turn in dataset.rows[0].turns] == [True, False, True, True]
    (error,) = dataset.errors
    assert "row 2: no turn from gpt has an answer, so there is nothing to learn" in error


@pytest.mark.parametrize(
    "turns, message",
    [
        ([QUESTION, ANSWER | {"weight": 0.5}], "turn 2 of conversations: weight is 0.5, expected"),
        ([QUESTION, ANSWER | {"loss": "no"}], "turn 2 of conversations: loss is 'no', expected"),
        ([QUESTION | {"loss": True}, ANSWER], "turn 1 of conversations: loss is True, but only"),
        (
            [QUESTION, ANSWER | {"tool_calls": [{}]}],
            "turn 2 of conversations: the key 'tool_calls' is unknown, expected from, value",
        ),
        ([QUESTION | {"image": "b.png"}, ANSWER], "turn 1 of conversations: the key 'image' is"),
        ([QUESTION | {"value": None}, ANSWER], "turn 1 of conversations: the keys are ['from']"),
        (
            messages([{"type": "video", "video": "a.mp4"}], "A."),
            "turn 1 of conversations: part 1: the key 'video' is unknown",
        ),
        (
            messages([{"type": "input_audio"}], "A."),
            "turn 1 of conversations: part 1: found {'type': 'input_audio'}",
        ),
        (
            messages([{"type": "image_url", "image_url": {"url": "http://a/b.png"}}], "A."),
            "part 1: the image is 'http://a/b.png'; images are not downloaded here",
        ),
        (
            [{"role": "system", "content": [PICTURE]}, QUESTION, ANSWER],
            "a system turn has an image",
        ),
        (messages(3, "A."), "turn 1 of conversations: the content is 3, expected a text or a list"),
    ],
)
def test_turns_that_cannot_be_read_are_named(tmp_path, turns, message):
    (error,) = read_dataset(write(tmp_path / "a.jsonl", {"conversations": turns})).errors
    assert error.startswith(f"{tmp_path / 'a.jsonl'}: row 1: ") and message in error


def test_data_urls(tmp_path):
    row = VALID | {"image": data_url()}
    (found,) = read_dataset(write(tmp_path / "a.jsonl", row)).rows
    assert found.find_missing_file() is None
    assert [image.getpixel((0, 0)) for image in found.open_images()] == [(255, 0, 0)]


def test_images_in_another_folder(tmp_path):
    (path,) = write(tmp_path / "a.jsonl", VALID)
    (tmp_path / "pictures").mkdir()
    (row,) = read_dataset([path], tmp_path / "pictures").rows
    assert row.images == (str(tmp_path / "pictures" / "dot.png"),)
    assert row.find_missing_file() == row.images[0]


@pytest.mark.parametrize("answer", ["A dot.", ANSWER, [{"role": "assistant", "content": "A dot."}]])
@pytest.mark.parametrize("key", ["prompt", "conversations", "messages"])
def test_spellings_of_a_preference_pair(tmp_path, answer, key):
    row = {"image": "dot.png", key: [QUESTION], "chosen": answer, "rejected": "No."}
    (found,) = read_dataset(write(tmp_path / "a.jsonl", row)).rows
    assert found.preference == ("A dot.", "No.")
    assert [turn["content"] for turn in found.turns] == [QUESTION["value"]]
