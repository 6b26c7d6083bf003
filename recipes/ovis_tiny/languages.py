"""Phrasing of questions and answers in each language."""

import random
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from recipes.ovis_tiny import english, german
from recipes.ovis_tiny.questions import TOPICS, Question


class Phrasings(NamedTuple):
    """Templates of one kind of question, with `{slots}` for its facts.

    Attributes:
      seen: templates for all splits.
      unseen: templates for the test set only; all their words occur in training.
    """

    seen: tuple[str, ...]
    unseen: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Phrasings":
        """Parse one template per line; those of `unseen` begin with "* "."""
        lines = text.splitlines()
        unseen = tuple(line.removeprefix("* ") for line in lines if line.startswith("* "))
        return cls(tuple(line for line in lines if not line.startswith("* ")), unseen)


class Topic(NamedTuple):
    """Templates of small talk and the values for their slots.

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


class Language(NamedTuple):
    """Phrases of one language; `english` and english.toml document the fields."""

    phrases: Mapping[str, Phrasings]
    openings: Sequence[str]
    template_slots: Callable[[Question], dict[str, str]]
    full_answer: Callable[[Question], str]
    short_answer: Callable[[Question], str]
    topics: Mapping[str, Topic]


def _read_language(module: ModuleType) -> Language:
    """Combine the answers of a module with the phrasings in the TOML file of the same name."""
    values = tomllib.loads(Path(str(module.__file__)).with_suffix(".toml").read_text("utf-8"))
    return Language(
        {name: Phrasings.parse(text) for name, text in values["phrases"].items()},
        values["openings"],
        module.template_slots,
        module.full_answer,
        module.short_answer,
        {name: _topic(name, topic, module.NUMBERS) for name, topic in values["topics"].items()},
    )


def _topic(name: str, values: Mapping[str, Any], numbers: Sequence[str]) -> Topic:
    entries = values.get("entries", "").split(", ")
    if name == "sum":
        pairs = [map(int, text.split()) for text in TOPICS[name]]
        entries = [f"{numbers[a]}/{numbers[b]}/{numbers[a + b]}" for a, b in pairs]
    return Topic(
        Phrasings.parse(values["phrases"]),
        values["answer"],
        values["short"],
        dict(zip(TOPICS[name], entries, strict=True)),
    )


LANGUAGES = {"en": _read_language(english), "de": _read_language(german)}

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
