"""ovis-tiny answers alike about copies of a picture that cameras and drawing programs write."""

from pathlib import Path

import numpy as np
import pytest
from image_files import INVERSE, add_exif_at_the_end, encode, exif_orientation, png_file
from PIL import Image

import ovis_jax
from ovis_jax.inputs.upright_rgb import TRANSPOSITIONS

pytestmark = pytest.mark.optimized

WORD = Path(__file__).parents[2] / "examples" / "word.png"
QUESTION, ANSWER = "Which word is in the picture?", "The word is WOLF."
PICTURE = Image.open(WORD).convert("RGB")
GRAY = np.asarray(PICTURE.convert("L")).astype(np.uint16)


def turned(orientation: int) -> Image.Image:
    return PICTURE.transpose(TRANSPOSITIONS[INVERSE[orientation]])


def transparent() -> Image.Image:
    """The picture with a transparent black background, as drawing programs store it."""
    pixels = np.asarray(PICTURE)
    is_drawn = (np.abs(pixels.astype(int) - pixels[0, 0]) > 20).any(axis=-1)
    alpha = np.where(is_drawn, 255, 0)
    return Image.fromarray(np.dstack([pixels * is_drawn[..., None], alpha]).astype(np.uint8))


COPIES = {
    "upright": WORD.read_bytes(),
    "16 bits": png_file(np.asarray(PICTURE).astype(np.uint16) * 257, 16),
    "16-bit gray": encode(Image.fromarray(GRAY * 257)),
    "16-bit gray TIFF": encode(Image.fromarray(GRAY * 257), "TIFF"),
    "transparent": encode(transparent()),
    "transparent WebP": encode(transparent(), "WEBP", lossless=True),
    "turned at the end": add_exif_at_the_end(encode(turned(8)), 8),
} | {
    f"turned {n}": encode(turned(n), "PNG" if n % 2 else "JPEG", exif=exif_orientation(n))
    for n in range(2, 9)
}


@pytest.fixture(scope="module")
def ovis():
    return ovis_jax.load("ovis-tiny")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", COPIES)
def test_the_answer_is_the_same(ovis, name, tmp_path):
    path = tmp_path / "word"
    path.write_bytes(COPIES[name])
    assert ovis.ask(QUESTION, path) == ANSWER
