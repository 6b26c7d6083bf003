"""A visitor's conversation and its images, and opening the images that a visitor uploads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ovis_jax.errors import ImageError, PromptError
from ovis_jax.inputs import open_image
from ovis_jax.inputs.conversation import Turn


@dataclass(frozen=True, eq=False)  # Gradio hashes values to detect changes
class Conversation:
    """The turns of a conversation, and their images.

    Attributes:
      turns: The turns, beginning with the user's first question.
      images: The images of all turns in order of appearance.
      num_last_images: Number of images in the last question.
    """

    turns: tuple[Turn, ...] = ()
    images: tuple[Image.Image, ...] = ()
    num_last_images: int = 0

    def with_question(self, text: str, images: Sequence[Image.Image]) -> "Conversation":
        """Return the conversation with a new question at the end.

        Raises:
          PromptError: The text is empty.
        """
        if not text.strip():
            raise PromptError("the question is empty; write what you want to know")
        content = [*[{"type": "image"}] * len(images), {"type": "text", "text": text.strip()}]
        turn = {"role": "user", "content": content}
        return Conversation((*self.turns, turn), (*self.images, *images), len(images))

    def without_last_question(self) -> "Conversation":
        """Return the conversation without its last, unanswered question, and without its images."""
        num_images = len(self.images) - self.num_last_images
        return Conversation(self.turns[:-1], self.images[:num_images])

    def with_answer(self, text: str) -> "Conversation":
        """Return the conversation with an answer to the last question at the end."""
        return Conversation((*self.turns, {"role": "assistant", "content": text}), self.images)


def open_uploaded_images(paths: Sequence[str]) -> tuple[list[tuple[str, Image.Image]], list[str]]:
    """Open uploaded files as images.

    Returns:
      The path and the image of each file that is an image, and an error message for each other
      file.
    """
    opened: list[tuple[str, Image.Image]] = []
    problems: list[str] = []
    num_pixels = 0
    for path in paths:
        name = Path(path).name  # visitors must not see the server's folders
        try:
            image = open_image.open_image_header(Path(path).read_bytes())
            num_pixels = open_image.add_image_pixels(
                num_pixels, image, open_image.DEFAULT_MAX_PIXELS
            )
            opened.append((path, open_image.decode_image(image)))
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
        except ImageError as error:
            problems.append(f"{name} cannot be shown: {error}")
    return opened, problems
