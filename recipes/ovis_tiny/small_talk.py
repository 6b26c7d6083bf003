"""Questions without a picture, in any language: simple facts, sums and greetings."""

from collections.abc import Sequence
from typing import NamedTuple

from recipes.ovis_tiny.phrasings import Phrasings
from recipes.ovis_tiny.questions import TOPICS


class Topic(NamedTuple):
    """Templates of a topic and the values for their slots.

    Attributes:
      phrasings: templates of the question, with {x} and {y}.
      answer: template of the answer as a full sentence, with {x}, {y} and {z}; capitalized later.
      short: template of the short answer.
      entries: x, y and z of each text of `questions.TOPICS`, separated by "/".
    """

    phrasings: Phrasings
    answer: str
    short: str
    entries: dict[str, str]


def topic_entries(topic: str, values: str) -> dict[str, str]:
    """Parse the entries of a topic from "x/y, x/y, ..." in the order of `questions.TOPICS`."""
    return dict(zip(TOPICS[topic], values.split(", "), strict=True))


def sum_entries(numbers: Sequence[str]) -> dict[str, str]:
    """Make the entries of "sum" from the words for numbers."""
    pairs = [(text, *map(int, text.split())) for text in TOPICS["sum"]]
    return {text: f"{numbers[a]}/{numbers[b]}/{numbers[a + b]}" for text, a, b in pairs}
