"""What ovis-tiny is asked without a picture, in any language: little facts, sums and greetings."""

from collections.abc import Sequence
from typing import NamedTuple

from recipes.ovis_tiny.phrasings import Phrasings
from recipes.ovis_tiny.questions import TOPICS


class Topic(NamedTuple):
    """Questions and answers of one form.

    Attributes:
      phrasings: how it is asked, with {x} and {y} from the entry.
      answer: the full sentence, with {x}, {y} and {z}; its first letter is made large.
      short: the same in few words.
      entries: x, y and z of each text of `questions.TOPICS`, divided by "/".
    """

    phrasings: Phrasings
    answer: str
    short: str
    entries: dict[str, str]


def entries_of(topic: str, values: str) -> dict[str, str]:
    """The entries of a topic from "x/y, x/y, ..." in the order of `questions.TOPICS`."""
    return dict(zip(TOPICS[topic], values.split(", "), strict=True))


def sums(numbers: Sequence[str]) -> dict[str, str]:
    """The entries of "sum" with the words for numbers."""
    pairs = [(text, *map(int, text.split())) for text in TOPICS["sum"]]
    return {text: f"{numbers[a]}/{numbers[b]}/{numbers[a + b]}" for text, a, b in pairs}
