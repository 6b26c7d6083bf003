"""A visitor's conversation and its images, and opening the images that a visitor uploads."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ovis_jax.errors import ImageError
from ovis_jax.inputs import open_image
from ovis_jax.inputs.conversation import Turn
from ovis_jax.ui.typed_text import escape_markup

DESCRIBE_ONE, DESCRIBE_MANY = "Describe the picture.", "Describe the pictures."
"""The questions for pictures without a text."""
PENDING_ANSWER = "…"


@dataclass(frozen=True, eq=False)
class Exchange:
    """A question and its answer.

    Attributes:
      text: Text of the question.
      files: Paths of the question's images. The server created these files.
      images: The images.
      answer: The answer; None if there is none.
      problem: The reason why there is no answer; empty while the answer is being generated.
      num_retries: Number of earlier answers to the same question.
    """

    text: str
    files: tuple[str, ...] = ()
    images: tuple[Image.Image, ...] = ()
    answer: str | None = None
    problem: str = ""
    num_retries: int = 0


@dataclass(frozen=True, eq=False)
class Conversation:
    """The questions and answers of one visitor. It never changes; methods return new ones.

    It is stored on the server, because a browser could insert the path of any file into messages
    that it sends back, and Gradio would serve a copy of the file.

    Attributes:
      exchanges: The questions and answers in order.
    """

    exchanges: tuple[Exchange, ...] = ()

    @property
    def num_retries(self) -> int:
        """Number of earlier answers to the last question."""
        return self.exchanges[-1].num_retries

    @property
    def prompted(self) -> tuple[Exchange, ...]:
        """The exchanges that the model reads: those with an answer, and the last one."""
        return (*(x for x in self.exchanges[:-1] if x.answer is not None), *self.exchanges[-1:])

    def ask(
        self, text: str, files: Sequence[str] = (), images: Sequence[Image.Image] = ()
    ) -> "Conversation":
        """Add a question. Without a text, it asks for a description of the images."""
        text = text.strip() or (DESCRIBE_ONE if len(images) == 1 else DESCRIBE_MANY)
        return Conversation((*self.exchanges, Exchange(text, tuple(files), tuple(images))))

    def retry(self) -> "Conversation":
        """Remove the answer to the last question."""
        last = self.exchanges[-1]
        again = replace(last, answer=None, problem="", num_retries=last.num_retries + 1)
        return Conversation((*self.exchanges[:-1], again))

    def edit(self, number: int, text: str) -> "Conversation":
        """Change the text of a question, and remove everything after it."""
        edited = self.exchanges[number]
        return Conversation(self.exchanges[:number]).ask(text, edited.files, edited.images)

    def without_last(self) -> "Conversation":
        """Remove the last question and its answer."""
        return Conversation(self.exchanges[:-1])

    def with_answer(self, text: str) -> "Conversation":
        """Set the answer to the last question."""
        return Conversation((*self.exchanges[:-1], replace(self.exchanges[-1], answer=text)))

    def with_problem(self, problem: str) -> "Conversation":
        """Set the reason why the last question has no answer."""
        return Conversation((*self.exchanges[:-1], replace(self.exchanges[-1], problem=problem)))

    def prompt(
        self, system_text: str, *, has_system_turns: bool
    ) -> tuple[list[Turn], list[Image.Image]]:
        """Return the turns and the images of the prompt for the last question.

        Args:
          system_text: Instructions. If the model has no system turns, they are prepended to the
            first question, as in the server.
          has_system_turns: Whether the model's conversations may have system turns.
        """
        system_text = system_text.strip()
        turns: list[Turn] = []
        if system_text and has_system_turns:
            turns.append({"role": "system", "content": system_text})
        for number, exchange in enumerate(self.prompted):
            text = exchange.text
            if system_text and not has_system_turns and number == 0:
                text = f"{system_text}\n\n{text}"
            images = [{"type": "image"}] * len(exchange.images)
            turns.append({"role": "user", "content": [*images, {"type": "text", "text": text}]})
            if exchange.answer is not None:
                turns.append({"role": "assistant", "content": exchange.answer})
        return turns, [image for exchange in self.prompted for image in exchange.images]

    def messages(self) -> list[dict[str, Any]]:
        """Return the messages of the chat: two per exchange, the question and the answer."""
        messages = []
        for exchange in self.exchanges:
            pictures = [{"path": path, "alt_text": "a picture"} for path in exchange.files]
            text = {"type": "text", "text": escape_markup(exchange.text)}
            answer = exchange.answer or PENDING_ANSWER
            if exchange.problem:
                answer = f"⚠️ {escape_markup(exchange.problem)}"
            messages.append({"role": "user", "content": [*pictures, text]})
            messages.append({"role": "assistant", "content": answer})
        return messages

    def to_json(self, model: str, system_text: str) -> str:
        """Return the answered questions as JSON: messages in OpenAI's format, and picture names."""
        messages: list[dict[str, Any]] = []
        if system_text.strip():
            messages.append({"role": "system", "content": system_text.strip()})
        for exchange in self.exchanges:
            if exchange.answer is not None:
                question: dict[str, Any] = {"role": "user", "content": exchange.text}
                if exchange.files:
                    question["pictures"] = [Path(path).name for path in exchange.files]
                messages += [question, {"role": "assistant", "content": exchange.answer}]
        return json.dumps({"model": model, "messages": messages}, ensure_ascii=False, indent=2)


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
