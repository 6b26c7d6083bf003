"""A visitor's conversation, and the images that a visitor uploads."""

import json
from pathlib import Path
from typing import Any

import pytest
from image_files import encode, exif_orientation
from PIL import Image

from ovis_jax.inputs import open_image
from ovis_jax.server.preprocess import convert_messages
from ovis_jax.server.request_schema import ChatRequest
from ovis_jax.ui.conversation import Conversation, open_uploaded_images

EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGE, OTHER = (Image.new("RGB", (size, size)) for size in (2, 3))


@pytest.fixture
def first():
    return Conversation().ask(" Who? ", ["a/b.png"], [IMAGE]).with_answer("I see <image>.")


def question(text: str, num_images: int = 0) -> dict[str, Any]:
    content = [*[{"type": "image"}] * num_images, {"type": "text", "text": text}]
    return {"role": "user", "content": content}


def test_prompt_has_all_questions_and_images(first):
    turns, images = first.ask("And <image> here?", ["c.png"], [OTHER]).prompt(
        "", has_system_turns=False
    )
    answer = {"role": "assistant", "content": "I see <image>."}
    assert turns == [question("Who?", 1), answer, question("And <image> here?", 1)]
    assert images == [IMAGE, OTHER]


def test_prompt_leaves_out_earlier_questions_without_an_answer(first):
    failed = Conversation().ask("No?", ["c.png"], [OTHER]).with_problem("too long")
    turns, images = failed.prompt("", has_system_turns=False)
    assert turns == [question("No?", 1)] and images == [OTHER]
    turns, images = failed.ask("Yes?").prompt("Be brief.", has_system_turns=False)
    assert turns == [question("Be brief.\n\nYes?")] and images == []


@pytest.mark.parametrize("num_questions", [1, 2])
def test_system_text_is_placed_like_that_of_the_server(first, num_questions):
    conversation = first.ask("Why?") if num_questions == 2 else first.retry()
    messages: list[Any] = [{"role": "system", "content": " Be brief. "}]
    image = {"type": "image_url", "image_url": "data:,"}
    messages.append({"role": "user", "content": [image, {"type": "text", "text": "Who?"}]})
    if num_questions == 2:
        messages.append({"role": "assistant", "content": "I see <image>."})
        messages.append({"role": "user", "content": "Why?"})
    for system_turns in (False, True):
        expected, _, _ = convert_messages(
            ChatRequest.model_validate({"model": "m", "messages": messages}).messages,
            system_turns=system_turns,
        )
        turns, _ = conversation.prompt(" Be brief. ", has_system_turns=system_turns)
        if system_turns:
            expected[0] = {"role": "system", "content": "Be brief."}
        assert turns == expected


def test_images_alone_ask_to_be_described():
    assert Conversation().ask("", ["a"], [IMAGE]).exchanges[0].text == "Describe the picture."
    two = Conversation().ask(" \n", ["a", "b"], [IMAGE, OTHER])
    assert two.exchanges[0].text == "Describe the pictures."


def test_retrying_editing_and_undoing(first):
    second = first.ask("Why?").with_answer("So.")
    again = second.retry()
    assert again.num_retries == 1 and again.exchanges[-1].answer is None
    assert again.with_answer("Because.").exchanges[0] is first.exchanges[0]
    (edited,) = second.edit(0, "Where?").exchanges
    assert (edited.text, edited.files, edited.images) == ("Where?", ("a/b.png",), (IMAGE,))
    assert edited.answer is None and edited.num_retries == 0
    assert second.without_last().exchanges == first.exchanges


def test_chat_has_two_messages_per_question(first):
    failed = first.ask("*Why*?").with_problem("<b>").ask("So?")
    messages = failed.messages()
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    picture, text = messages[0]["content"]
    assert picture["path"] == "a/b.png" and text == {"type": "text", "text": "Who?"}
    assert messages[2]["content"][0]["text"] == "&#42;Why&#42;?"
    assert [message["content"] for message in messages[1::2]] == [
        "I see <image>.",
        "⚠️ &#60;b&#62;",
        "…",
    ]


def test_json_has_the_answered_questions_without_the_folders(first):
    exported = json.loads(first.ask("Why?").with_problem("failed").to_json("tiny", " Be brief. "))
    assert exported == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who?", "pictures": ["b.png"]},
            {"role": "assistant", "content": "I see <image>."},
        ],
    }


def test_files_that_are_not_images_are_reported_without_their_folder(tmp_path):
    for name, data in (("text.png", b"no picture"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(data)
    good = str(EXAMPLES / "wide.png")
    names = ("text.png", "none.png", "empty.png")
    opened, problems = open_uploaded_images([*(str(tmp_path / name) for name in names), good])
    assert [(path, image.size) for path, image in opened] == [(good, (168, 84))]
    for problem, name in zip(problems, names, strict=True):
        assert problem.startswith(name)
        assert str(tmp_path) not in problem and "0x" not in problem


def test_uploads_are_turned_upright_and_put_on_white(tmp_path):
    wide = Image.open(EXAMPLES / "wide.png")
    stored = wide.transpose(Image.Transpose.ROTATE_90)
    stored.putalpha(255)
    stored.paste((0, 0, 0, 0), (0, 0, 84, 42))
    (tmp_path / "a.png").write_bytes(encode(stored, exif=exif_orientation(6)))
    ((_, image),), problems = open_uploaded_images([str(tmp_path / "a.png")])
    wide.paste("white", (126, 0, 168, 84))
    assert image.tobytes() == wide.tobytes() and problems == []


def test_uploads_are_limited_like_images_for_the_server(tmp_path, monkeypatch):
    """Formats that start other programs are rejected, and so are too many pixels."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    monkeypatch.setattr(open_image, "DEFAULT_MAX_PIXELS", 4 * 84 * 84)
    wide = str(EXAMPLES / "wide.png")
    opened, problems = open_uploaded_images([str(tmp_path / "a.png"), wide, wide, wide])
    assert [image.size for _, image in opened] == [(168, 84)] * 2
    assert "PNG, JPEG, WEBP, GIF, BMP" in problems[0]
    assert problems[1].startswith("wide.png") and f"{4 * 84 * 84} pixels" in problems[1]
