"""From a question to what is said, in one of the LANGUAGES."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from recipes.ovis_tiny import english, german, small_talk_english, small_talk_german
from recipes.ovis_tiny.phrasings import Phrasings
from recipes.ovis_tiny.questions import Question
from recipes.ovis_tiny.small_talk import Topic


class Language(NamedTuple):
    """How questions are asked and answered in one language; see `english` for each field."""

    phrases: Mapping[str, Phrasings]
    openings: Sequence[str]
    slots: Callable[[Question], dict[str, str]]
    answer: Callable[[Question], str]
    short: Callable[[Question], str]
    topics: Mapping[str, Topic]


LANGUAGES = {
    name: Language(
        module.PHRASES, module.OPENINGS, module.slots, module.answer, module.short, topics
    )
    for name, module, topics in (
        ("en", english, small_talk_english.TOPICS),
        ("de", german, small_talk_german.TOPICS),
    )
}

NOT_OPENED = ("compare", "count_one", "follow_up", "text", "echo")
"""Kinds whose questions take no opening such as "Look at the picture."."""


class Said(NamedTuple):
    """A question and its answers in words."""

    question: str
    answer: str
    short: str


def say(question: Question, name: str, rng: random.Random, *, unseen: bool = False) -> list[Said]:
    """Say a question and its answer; a "follow_up" comes after its first question.

    Args:
      question: what is asked.
      name: the one of LANGUAGES.
      rng: chooses the phrasing.
      unseen: whether to take a phrasing that stands in the test only.
    """
    before = say(question.first, name, rng) if question.first else []
    return [*before, _say(question, LANGUAGES[name], rng, unseen)]


def _say(question: Question, language: Language, rng: random.Random, unseen: bool) -> Said:
    if question.kind == "text":
        topic = language.topics[question.asked]
        x, y, z = [*topic.entries[question.text].split("/"), "", ""][:3]
        slots = {"x": x, "y": y, "z": z}
        return Said(
            _fill(topic.phrasings, slots, rng, unseen),
            _capital(topic.answer.format(**slots)),
            _capital(topic.short.format(**slots)),
        )
    asked = _fill(language.phrases[question.phrasing], language.slots(question), rng, unseen)
    # Test-only phrasings stand alone: what is new in them is the phrasing.
    if question.kind not in NOT_OPENED and not unseen and rng.random() < 0.25:
        asked = rng.choice(language.openings) + asked
    return Said(asked, language.answer(question), language.short(question))


def _fill(phrasings: Phrasings, slots: dict[str, str], rng: random.Random, unseen: bool) -> str:
    return rng.choice(phrasings.unseen if unseen else phrasings.seen).format(**slots)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
