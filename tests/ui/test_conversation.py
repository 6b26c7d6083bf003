"""A visitor's conversation, and the images that a visitor uploads."""

from pathlib import Path

import pytest
from image_files import encode, exif_orientation
from PIL import Image

from ovis_jax.errors import PromptError
from ovis_jax.inputs import open_image
from ovis_jax.ui.conversation import Conversation, open_uploaded_images

EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGE = Image.new("RGB", (2, 2))


def test_conversation_keeps_the_images_of_earlier_questions():
    first = Conversation().with_question("Who?", [IMAGE, IMAGE]).with_answer("I see <image>.")
    second = first.with_question(" And <image> here? ", [IMAGE])
    image = {"type": "image"}
    assert [turn["content"] for turn in second.turns] == [
        [image, image, {"type": "text", "text": "Who?"}],
        "I see <image>.",
        [image, {"type": "text", "text": "And <image> here?"}],
    ]
    assert len(second.images) == 3
    restored = second.without_last_question()
    assert restored.turns == first.turns and restored.images == first.images
    assert first.with_question("Why?", []).without_last_question().images == first.images


def test_empty_question_is_an_error():
    with pytest.raises(PromptError, match="the question is empty"):
        Conversation().with_question(" \n", [IMAGE])


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
