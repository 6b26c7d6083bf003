"""Paths of images as people type, paste and drop them on a terminal."""

import pytest
from image_files import encode
from PIL import Image
from typer.testing import CliRunner

from ovis_jax.cli import app
from ovis_jax.console import parse_image_path
from ovis_jax.errors import ImageError
from ovis_jax.inputs.open_image import open_image


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder, which is not the current folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize(
    "text, name",
    [
        ("~/a.png", "a.png"),
        ("'~/a.png'", "a.png"),
        ("HOME/a.png", "a.png"),
        ("'HOME/a.png'", "a.png"),
        ('"HOME/my picture.png"', "my picture.png"),
        ("HOME/my picture.png", "my picture.png"),
        ("~/my picture.png", "my picture.png"),
        ("~/my\\ picture.png", "my picture.png"),
        ("HOME/my\\ picture.png", "my picture.png"),
        ("HOME/'my picture'.png", "my picture.png"),
        ("~/it's.png", "it's.png"),
        ("HOME/it\\'s.png", "it's.png"),
        ("'HOME/it'\\''s.png'", "it's.png"),
        ('HOME/say "hi".png', 'say "hi".png'),
        ("HOME/a\\ b.png", "a\\ b.png"),
        ("file://HOME/a.png", "a.png"),
        ("file://localhostHOME/my%20picture.png", "my picture.png"),
        ("'file://HOME/50%25.png'", "50%.png"),
        ("FILE://HOME/my%20picture.png", "my picture.png"),
    ],
)
def test_paths_of_images(home, text, name):
    width = 2 + len(name)
    (home / name).write_bytes(encode(Image.new("RGB", (width, 2))))
    assert open_image(parse_image_path(text.replace("HOME", str(home)))).size == (width, 2)


def test_a_missing_file_keeps_its_name(home):
    assert parse_image_path("~/my none.png") == str(home / "my none.png")
    assert parse_image_path("it's none.png") == "it's none.png"
    assert parse_image_path("https://example.org/a.png") == "https://example.org/a.png"


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "Who?"], ["words", "--heatmap", "out.png"]]
)
def test_the_option_image(home, command):
    def message(value: str) -> str:
        result = CliRunner().invoke(app, [*command, f"--image={value}"])
        assert isinstance(result.exception, ImageError), result
        return str(result.exception)

    assert message("~/none.png").startswith(f"{home}/none.png cannot be read: No such file")
    (home / "text.png").write_text("text")
    assert message("~/text.png").startswith(f"{home}/text.png cannot be decoded")
    assert message(f"file://{home}/text.png").startswith(f"file://{home}/text.png cannot be dec")
    assert message("https://example.org/a.png").startswith("https://example.org/a.png is a URL")
