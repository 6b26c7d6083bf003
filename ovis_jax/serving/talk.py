"""A conversation on the page: what was said, the pictures it is about."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ovis_jax.answering import mark_images
from ovis_jax.errors import ImageError, PromptError
from ovis_jax.inputs.conversation import Turn
from ovis_jax.serving import decoding


@dataclass(frozen=True, eq=False)  # Gradio hashes it to see whether it was replaced
class Talk:
    """Turns, and the images they speak of in order of appearance."""

    turns: tuple[Turn, ...] = ()
    images: tuple[Image.Image, ...] = ()
    last: int = 0  # how many of the images came with the last question

    def ask(self, text: str, images: Sequence[Image.Image]) -> "Talk":
        """The same with one more turn of the user's.

        Raises:
          PromptError: the text is empty.
        """
        if not text.strip():
            raise PromptError("there is no question: write what you want to know")
        turn = {"role": "user", "content": mark_images(text.strip(), len(images))}
        return Talk((*self.turns, turn), (*self.images, *images), len(images))

    def take_back(self) -> "Talk":
        """The same without the last question, which has no answer, and its images."""
        return Talk(self.turns[:-1], self.images[: len(self.images) - self.last])

    def answered(self, text: str) -> "Talk":
        """The same with an answer to the last turn."""
        return Talk((*self.turns, {"role": "assistant", "content": text}), self.images)


def open_files(paths: Sequence[str]) -> tuple[list[tuple[str, Image.Image]], list[str]]:
    """Open uploaded files; gives those that are pictures, and what is wrong with the others."""
    opened: list[tuple[str, Image.Image]] = []
    faults: list[str] = []
    pixels = 0
    for path in paths:
        try:
            image = decoding.open_header(Path(path).read_bytes())
            pixels = decoding.add_pixels(pixels, image, decoding.MAX_PIXELS)
            decoding.decode(image)
            opened.append((path, image))
        # Under their own names: the folder is the server's affair.
        except OSError as error:
            faults.append(f"{Path(path).name} cannot be read: {error.strerror}")
        except ImageError as error:
            faults.append(f"{Path(path).name} cannot be shown: {error}")
    return opened, faults
