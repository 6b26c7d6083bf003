"""Rows of the data sets: conversations about scenes, in the dataset format of the original code."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from recipes.ovis_tiny import questions
from recipes.ovis_tiny.languages import LANGUAGES, PhrasedQuestion, phrase_question
from recipes.ovis_tiny.questions import Question
from recipes.ovis_tiny.scenes import (
    DIGITS,
    HELD_OUT_COLOUR,
    SQUARE,
    WIDE,
    WORDS,
    Scene,
    random_scene,
)

TEXT_SHARE, ECHO_SHARE, COMPARE_SHARE = 0.06, 0.02, 0.10
"""Fractions of training rows: small talk, words to repeat, and comparisons of two pictures."""
WIDE_SHARE = 0.12
"""Fraction of wide pictures among single pictures."""
DIGIT_SHARE, WORD_SHARE = 0.14, 0.16
"""Fractions of single pictures with a digit and with a word."""
SWITCH_SHARE = 0.1
"""Probability that a turn changes the language."""

QUESTION_WEIGHTS = {
    "shape": 0.9,
    "colour": 0.9,
    "count": 1.3,
    "count_colour": 1.5,
    "exists": 1.5,
    "where": 1.5,
    "size": 0.9,
    "describe": 1.1,
    "follow_up": 0.9,
}
"""Relative frequency of each kind of question in training; hard kinds are more frequent."""

PAIR_WEIGHTS = {"where": 6, "follow_up": 3, "size": 2, "count_colour": 2}
"""Relative frequency of kinds in preference rows; all others have 1. Kinds whose short answer
begins with a fact that is hard to see are more frequent."""

UNCHANGED_FREQUENCIES: Mapping[str, float] = MappingProxyType({})
"""Factors that leave QUESTION_WEIGHTS unchanged."""


@dataclass(frozen=True)
class SceneRow:
    """A line of a data set, and the scenes of its pictures.

    Attributes:
      scenes: scenes of the pictures, in order.
      entry: fields of the line, except for "id" and "image".
    """

    scenes: tuple[Scene, ...]
    entry: dict[str, Any]


def training_row(
    rng: random.Random,
    colour: str = "",
    frequencies: Mapping[str, float] = UNCHANGED_FREQUENCIES,
) -> SceneRow:
    """Make a training row, usually with three or four questions about the same picture.

    Args:
      rng: source of all random choices.
      colour: colour that the picture contains and that every question or answer mentions.
      frequencies: factors that multiply QUESTION_WEIGHTS, by kind.
    """
    drawn = rng.random()
    if colour:
        scene = _single_scene(rng, "train", colour=colour)
        return _phrase_row((scene,), _questions_about(scene, rng, colour), rng)
    if drawn < TEXT_SHARE:
        count = rng.randint(1, 3)
        asked = [questions.random_small_talk_question(rng) for _ in range(count)]
        return _phrase_row((), asked, rng)
    if drawn < TEXT_SHARE + ECHO_SHARE:
        return _phrase_row((), [Question("echo", text=_random_word(rng)) for _ in range(3)], rng)
    if drawn < TEXT_SHARE + ECHO_SHARE + COMPARE_SHARE:
        first, second = _scene_pair(rng, "train")
        asked = [
            questions.compare_counts(first, second),
            questions.ask_count_in_one_picture(first, second, rng),
        ]
        return _phrase_row((first, second), rng.sample(asked, 2), rng)
    scene = _single_scene(rng, "train", columns=_random_columns(rng))
    return _phrase_row((scene,), _questions_about(scene, rng, frequencies=frequencies), rng)


def description_row(rng: random.Random, scene: Scene) -> SceneRow:
    """Make a row for the first training stage: a complete description of a picture."""
    asked = [questions.ask_description(scene)]
    if scene.text:
        kind = "digit" if scene.digit else "word"
        asked.insert(rng.randrange(2), Question(kind, text=scene.text))
    return _phrase_row((scene,), asked, rng)


def evaluation_row(
    rng: random.Random, split: str, kind: str, language: str, unseen: bool, colour: str = ""
) -> SceneRow:
    """Make a row whose last answer is scored.

    It has the field kind, and the metadata language, paraphrase and short.

    Args:
      rng: source of all random choices.
      split: one of `scenes.SPLITS`.
      kind: one of `questions.KINDS`.
      language: one of LANGUAGES.
      unseen: use a phrasing for the scored question that occurs in the test set only.
      colour: colour that the question or answer mentions.
    """
    scenes, question = _question_of_kind(rng, split, kind, colour)
    turns = phrase_question(question, language, rng, unseen=unseen)
    extra = {
        "kind": kind,
        "metadata": {
            "language": language,
            "paraphrase": unseen,
            "short": turns[-1].short_answer,
        },
    }
    return SceneRow(scenes, {"conversations": _conversation(scenes, turns), **extra})


def preference_row(rng: random.Random) -> SceneRow:
    """Make a row that prefers the short answer to the full sentence."""
    weights = [PAIR_WEIGHTS.get(kind, 1) for kind in questions.KINDS]
    (kind,) = rng.choices(questions.KINDS, weights)
    scenes, question = _question_of_kind(rng, "train", kind, "")
    turns = phrase_question(question, rng.choice(list(LANGUAGES)), rng)
    *prompt, _ = _conversation(scenes, turns)
    entry = {
        "prompt": prompt if len(prompt) > 1 else prompt[0]["value"],
        "chosen": turns[-1].short_answer,
        "rejected": turns[-1].answer,
    }
    return SceneRow(scenes, entry)


def _question_of_kind(
    rng: random.Random, split: str, kind: str, colour: str
) -> tuple[tuple[Scene, ...], Question]:
    """A question of a kind, and the scenes that it is about."""
    if kind == "text":
        return (), questions.random_small_talk_question(rng)
    if kind == "compare":
        first, second = _scene_pair(rng, split)
        return (first, second), questions.compare_counts(first, second)
    texts = {"digit": DIGITS, "word": WORDS}.get(kind)
    while True:
        columns = SQUARE if kind == "describe" else _random_columns(rng)
        scene = _single_scene(rng, split, columns=columns, texts=texts, colour=colour)
        if question := questions.ask_about_scene(kind, scene, rng, colour):
            return (scene,), question


def _random_columns(rng: random.Random) -> int:
    return WIDE if rng.random() < WIDE_SHARE else SQUARE


def _single_scene(
    rng: random.Random,
    split: str,
    *,
    columns: int = SQUARE,
    texts: Sequence[str] | None = None,
    colour: str = "",
) -> Scene:
    """A scene of a single picture; unless `texts` is given, some have a digit or a word."""
    if texts is None:
        drawn = rng.random()
        texts = DIGITS if drawn < DIGIT_SHARE else WORDS if drawn < DIGIT_SHARE + WORD_SHARE else ()
    return random_scene(rng, split, columns=columns, texts=texts, colour=colour)


def _scene_pair(rng: random.Random, split: str) -> tuple[Scene, Scene]:
    """Two square scenes; the first, the second or neither has more things, equally often."""
    larger = rng.randrange(3)
    if larger == 0:
        counts = [rng.randint(1, 5)] * 2
    else:
        counts = sorted(rng.sample(range(1, 6), 2), reverse=larger == 1)
    first, second = (random_scene(rng, split, count=count) for count in counts)
    return first, second


def _questions_about(
    scene: Scene,
    rng: random.Random,
    colour: str = "",
    frequencies: Mapping[str, float] = UNCHANGED_FREQUENCIES,
) -> list[Question]:
    """One to four different questions about a scene; a description comes last."""
    number = rng.choices((1, 2, 3, 4), (1, 1, 4, 4))[0]
    weights = [weight * frequencies.get(kind, 1) for kind, weight in QUESTION_WEIGHTS.items()]
    found: list[Question] = []
    if scene.text and not colour:
        kind = "digit" if scene.digit else "word"
        found.append(Question(kind, text=scene.text))
    for _ in range(20):
        if len(found) >= number:
            break
        (kind,) = rng.choices(list(QUESTION_WEIGHTS), weights)
        if colour and kind not in (*questions.COLOUR_KINDS, "follow_up"):
            continue
        question = questions.ask_about_scene(kind, scene, rng, colour)
        facts, kinds = [_revealed(other) for other in found], [other.kind for other in found]
        most = 1 if kind == "count" else 2
        if question and _revealed(question) not in facts and kinds.count(kind) < most:
            found.append(question)
    rng.shuffle(found)
    # After a description, the answers could be copied from it instead of read from the picture.
    return sorted(found, key=lambda question: question.kind == "describe")


def _revealed(question: Question) -> Question:
    """The fact that a question reveals, regardless of how it names the thing."""
    question = question.first or question
    return replace(question, colour="") if question.kind in ("where", "size") else question


def _random_word(rng: random.Random) -> str:
    """A random word, so that rare pieces of the tokenizer are learned, too."""
    while True:
        syllables = [
            rng.choice("bcdfghjklmnpqrstvwz")
            + rng.choice("aeiouäöü")
            + rng.choice(["", "", *"klmnrst"])
            for _ in range(rng.randint(1, 3))
        ]
        word = "".join(syllables)[rng.randrange(2) :]
        if HELD_OUT_COLOUR not in word and "rosa" not in word:
            return word


def _phrase_row(
    scenes: tuple[Scene, ...], asked: Sequence[Question], rng: random.Random
) -> SceneRow:
    language = rng.choice(list(LANGUAGES))
    turns: list[PhrasedQuestion] = []
    for question in asked:
        if turns and rng.random() < SWITCH_SHARE:
            language = rng.choice([name for name in LANGUAGES if name != language])
        turns += phrase_question(question, language, rng)
    return SceneRow(scenes, {"conversations": _conversation(scenes, turns)})


def _conversation(
    scenes: Sequence[Scene], turns: Sequence[PhrasedQuestion]
) -> list[dict[str, str]]:
    """The turns in the original's format, with image placeholders before the first question."""
    conversation: list[dict[str, str]] = []
    for number, turn in enumerate(turns):
        images = "" if number else "<image>\n" * len(scenes)
        conversation.append({"from": "human", "value": images + turn.question})
        conversation.append({"from": "gpt", "value": turn.answer})
    return conversation
