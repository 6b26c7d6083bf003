"""What the chat in the terminal asks the model."""

from pathlib import Path

import numpy as np
import pytest

from ovis_jax import generate_and_chat_commands as commands
from ovis_jax.config import OvisConfig
from ovis_jax.inputs.processor import Processor
from ovis_jax.loading import PartialAnswer

ROOT = Path(__file__).parents[1]
TINY = ROOT / "ovis_jax" / "assets" / "ovis-tiny"
SHAPES = ROOT / "examples" / "shapes.png"


class EchoingOvis:
    """Encodes each prompt, and answers with a fixed text."""

    processor = Processor.from_folder(TINY, OvisConfig.from_folder(TINY))

    def __init__(self, answer: str):
        self.answer, self.tokens = answer, []

    def stream_answer(self, prompt, images, *, max_new_tokens, sampling, seed, **options):
        self.tokens.append(self.processor.encode(prompt, images, **options).tokens)
        yield PartialAnswer(self.answer, self.answer, (), "stop", 0, 0.0, 0.0)


@pytest.fixture
def chat(monkeypatch, capsys):
    """Run a chat with given lines; returns the model that was asked, and the errors."""

    def chat(*lines: str, answer: str) -> tuple[EchoingOvis, str]:
        ovis, remaining = EchoingOvis(answer), iter(lines)
        monkeypatch.setattr(commands, "load", lambda *_, **__: ovis)
        monkeypatch.setattr(commands, "_read_line", lambda: next(remaining, None))
        commands.chat_command()
        return ovis, capsys.readouterr().err

    return chat


def test_an_image_mark_in_a_question_or_an_answer_is_text(chat):
    lines = (f"/image {SHAPES}", "What does <image> mean?", "And <image>?")
    ovis, errors = chat(*lines, answer="I see <image>.")
    assert "error" not in errors
    first, second = ovis.tokens
    assert np.flatnonzero(first <= -300)[0] == 4  # the picture comes first
    assert (first == -300).sum() == (second == -300).sum() > 0
    text = ovis.processor.tokenizer.decode(second[second >= 0])
    assert text.count("<image>") == 3  # in two questions and an answer


def test_pictures_dropped_on_the_terminal(chat, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    picture = tmp_path / "my shapes.png"
    picture.write_bytes(SHAPES.read_bytes())
    expected, _ = chat(f"/image {SHAPES}", "Who?", answer="Me.")
    quoted = str(picture).replace(" ", "\\ ")
    for path in ("~/my shapes.png", f"'{picture}'", f'"{picture}"', quoted, picture.as_uri()):
        ovis, errors = chat(f"/image {path}", "Who?", answer="Me.")
        assert "error" not in errors
        np.testing.assert_array_equal(ovis.tokens, expected.tokens)
    _, errors = chat("/image ~/none.png", answer="Me.")
    assert f"error: {tmp_path}/none.png cannot be read: No such file" in errors
