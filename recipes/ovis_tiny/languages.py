"""Phrasing of questions and answers in each language."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from recipes.ovis_tiny import english, german, small_talk_english, small_talk_german
from recipes.ovis_tiny.phrasings import Phrasings
from recipes.ovis_tiny.questions import Question
from recipes.ovis_tiny.small_talk import Topic


class Language(NamedTuple):
    """Phrases of one language; `english` documents the fields."""

    phrases: Mapping[str, Phrasings]
    openings: Sequence[str]
    template_slots: Callable[[Question], dict[str, str]]
    full_answer: Callable[[Question], str]
    short_answer: Callable[[Question], str]
    topics: Mapping[str, Topic]


LANGUAGES = {
    name: Language(
        module.PHRASES,
        module.OPENINGS,
        module.template_slots,
        module.full_answer,
        module.short_answer,
        topics,
    )
    for name, module, topics in (
        ("en", english, small_talk_english.TOPICS),
        ("de", german, small_talk_german.TOPICS),
    )
}

KINDS_WITHOUT_OPENING = ("compare", "count_one", "follow_up", "text", "echo")
"""Kinds whose questions have no opening such as "Look at the picture."."""


class PhrasedQuestion(NamedTuple):
    """A question and its answers in words."""

    question: str
    answer: str
    short_answer: str


def phrase_question(
    question: Question, language: str, rng: random.Random, *, unseen: bool = False
) -> list[PhrasedQuestion]:
    """Phrase a question and its answer; a "follow_up" comes after its first question.

    Args:
      question: the question.
      language: one of LANGUAGES.
      rng: source of all random choices.
      unseen: use a phrasing that occurs in the test set only.
    """
    first = phrase_question(question.first, language, rng) if question.first else []
    return [*first, _phrase(question, LANGUAGES[language], rng, unseen)]


def _phrase(
    question: Question, language: Language, rng: random.Random, unseen: bool
) -> PhrasedQuestion:
    if question.kind == "text":
        topic = language.topics[question.asked]
        x, y, z = [*topic.entries[question.text].split("/"), "", ""][:3]
        slots = {"x": x, "y": y, "z": z}
        return PhrasedQuestion(
            _fill_template(topic.phrasings, slots, rng, unseen),
            _capitalize(topic.answer.format(**slots)),
            _capitalize(topic.short.format(**slots)),
        )
    asked = _fill_template(
        language.phrases[question.phrasing], language.template_slots(question), rng, unseen
    )
    # Test-only phrasings have no opening, so that only the phrasing is new.
    if question.kind not in KINDS_WITHOUT_OPENING and not unseen and rng.random() < 0.25:
        asked = rng.choice(language.openings) + asked
    return PhrasedQuestion(asked, language.full_answer(question), language.short_answer(question))


def _fill_template(
    phrasings: Phrasings, slots: dict[str, str], rng: random.Random, unseen: bool
) -> str:
    return rng.choice(phrasings.unseen if unseen else phrasings.seen).format(**slots)


def _capitalize(text: str) -> str:
    return text[0].upper() + text[1:]
