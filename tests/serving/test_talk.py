"""The conversation of a page, its controls and its command, without a browser."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ovis_jax.errors import PromptError
from ovis_jax.serving import decoding
from ovis_jax.serving.talk import Talk, open_files

ROOT = Path(__file__).parents[2]
IMAGE = Image.new("RGB", (2, 2))


def test_turns_keep_the_images_of_earlier_ones():
    first = Talk().ask("Who?", [IMAGE, IMAGE]).answered("Me.")
    second = first.ask(" And <image> here? ", [IMAGE])
    assert [turn["content"] for turn in second.turns] == [
        "<image>\n<image>\nWho?",
        "Me.",
        "And <image> here?",
    ]
    assert len(second.images) == 3
    back = second.take_back()
    assert back.turns == first.turns and back.images == first.images
    assert first.ask("Why?", []).take_back().images == first.images


def test_an_empty_question_is_refused():
    with pytest.raises(PromptError, match="there is no question"):
        Talk().ask(" \n", [IMAGE])


def test_files_that_are_no_pictures_are_named(tmp_path):
    for name, data in (("text.png", b"no picture"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(data)
    good = str(ROOT / "examples" / "wide.png")
    paths = [str(tmp_path / name) for name in ("text.png", "none.png", "empty.png")]
    opened, faults = open_files([*paths, good])
    assert [(path, image.size) for path, image in opened] == [(good, (168, 84))]
    for fault, name in zip(faults, ("text.png", "none.png", "empty.png"), strict=True):
        assert fault.startswith(name) and str(tmp_path) not in fault and "0x" not in fault


def test_pictures_are_read_as_the_server_reads_them(tmp_path, monkeypatch):
    """No formats that start other programs, and nothing huge."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 4 * 84 * 84)
    wide = str(ROOT / "examples" / "wide.png")
    opened, faults = open_files([str(tmp_path / "a.png"), wide, wide, wide])
    assert [image.size for _, image in opened] == [(168, 84)] * 2
    assert "PNG, JPEG, WEBP, GIF, BMP" in faults[0]
    assert faults[1].startswith("wide.png cannot be shown: the image is 168 x 84, with the images")


def test_the_examples_are_those_of_the_project():
    for path in (ROOT / "ovis_jax" / "assets" / "page").glob("*.png"):
        assert path.read_bytes() == (ROOT / "examples" / path.name).read_bytes()


def test_without_gradio_the_command_says_what_to_install():
    program = (
        "import sys; sys.modules['gradio'] = None; sys.argv = ['ovis-jax', 'ui'];"
        "from ovis_jax.cli import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 2
    assert "pip install 'ovis-jax[ui]'" in result.stderr and "Traceback" not in result.stderr
