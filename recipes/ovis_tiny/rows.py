"""Rows of the data sets: conversations about scenes, in the original's format.

A row names its pictures by where they are to be written; `Row.scenes` says what they show.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from recipes.ovis_tiny import questions
from recipes.ovis_tiny.languages import LANGUAGES, Said, say
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
"""The shares of training rows without a picture, and with two."""
WIDE_SHARE = 0.12
"""The share of wide pictures among single ones."""
DIGIT_SHARE, WORD_SHARE = 0.14, 0.16
"""The shares of single pictures with a digit and with a word."""
SWITCH_SHARE = 0.1
"""How often a turn is in another language than the one before."""

WEIGHTS = {
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
"""How often a kind is asked about a training picture; hard kinds more."""

PAIR_WEIGHTS = {"where": 6, "follow_up": 3, "size": 2, "count_colour": 2}
"""How often a preference pair is of a kind, others once; more where what the short answer begins
with is hard to see."""

NO_MORE: Mapping[str, float] = MappingProxyType({})
"""No kind is asked more often than WEIGHTS says."""


@dataclass(frozen=True)
class Row:
    """One line of a data set, and the scenes of its pictures.

    Attributes:
      scenes: what the pictures show, in order.
      entry: the line, as yet without "id" and "image".
    """

    scenes: tuple[Scene, ...]
    entry: dict[str, Any]


def training_row(rng: random.Random, colour: str = "", more: Mapping[str, float] = NO_MORE) -> Row:
    """Make a row of one to four questions, mostly three or four, about the same picture.

    With a `colour`, the picture has things of that colour, and every question names it. `more`
    says how many times as often as WEIGHTS has it a kind is asked.
    """
    kind = rng.random()
    if colour:
        scene = _single(rng, "train", colour=colour)
        return _row((scene,), _about(scene, rng, colour), rng)
    if kind < TEXT_SHARE:
        return _row((), [questions.text_only(rng) for _ in range(rng.randint(1, 3))], rng)
    if kind < TEXT_SHARE + ECHO_SHARE:
        return _row((), [Question("echo", text=_made_up(rng)) for _ in range(3)], rng)
    if kind < TEXT_SHARE + ECHO_SHARE + COMPARE_SHARE:
        first, second = _pair(rng, "train")
        asked = [questions.compare(first, second), questions.count_one(first, second, rng)]
        return _row((first, second), rng.sample(asked, 2), rng)
    scene = _single(rng, "train", columns=_columns(rng))
    return _row((scene,), _about(scene, rng, more=more), rng)


def listing_row(rng: random.Random, scene: Scene) -> Row:
    """Make a row for the first stage of training: everything that a picture shows is said."""
    asked = [questions.describe(scene)]
    if scene.text:
        kind = "digit" if scene.digit else "word"
        asked.insert(rng.randrange(2), Question(kind, text=scene.text))
    return _row((scene,), asked, rng)


def scored_row(
    rng: random.Random, split: str, kind: str, language: str, unseen: bool, colour: str = ""
) -> Row:
    """Make a row whose last answer is scored, with the keys kind, language, paraphrase and short.

    Args:
      rng: decides everything else.
      split: the one of `scenes.SPLITS` that its scenes are of.
      kind: the one of `questions.KINDS`.
      language: the one of LANGUAGES.
      unseen: whether the scored question has a phrasing that stands in the test only.
      colour: a colour that the question or answer names.
    """
    scenes, question = _scored(rng, split, kind, colour)
    said = say(question, language, rng, unseen=unseen)
    extra = {
        "kind": kind,
        "language": language,
        "paraphrase": unseen,
        "short": said[-1].short,
    }
    return Row(scenes, {"conversations": _conversation(scenes, said), **extra})


def preference_row(rng: random.Random) -> Row:
    """Make a row that prefers the short answer to the full sentence."""
    weights = [PAIR_WEIGHTS.get(kind, 1) for kind in questions.KINDS]
    (kind,) = rng.choices(questions.KINDS, weights)
    scenes, question = _scored(rng, "train", kind, "")
    said = say(question, rng.choice(list(LANGUAGES)), rng)
    *prompt, _ = _conversation(scenes, said)
    entry = {
        "prompt": prompt if len(prompt) > 1 else prompt[0]["value"],
        "chosen": said[-1].short,
        "rejected": said[-1].answer,
    }
    return Row(scenes, entry)


def _scored(
    rng: random.Random, split: str, kind: str, colour: str
) -> tuple[tuple[Scene, ...], Question]:
    """Scenes and a question of a kind about them."""
    if kind == "text":
        return (), questions.text_only(rng)
    if kind == "compare":
        first, second = _pair(rng, split)
        return (first, second), questions.compare(first, second)
    texts = {"digit": DIGITS, "word": WORDS}.get(kind)
    while True:
        columns = SQUARE if kind == "describe" else _columns(rng)
        scene = _single(rng, split, columns=columns, texts=texts, colour=colour)
        if question := questions.ask(kind, scene, rng, colour):
            return (scene,), question


def _columns(rng: random.Random) -> int:
    return WIDE if rng.random() < WIDE_SHARE else SQUARE


def _single(
    rng: random.Random,
    split: str,
    *,
    columns: int = SQUARE,
    texts: Sequence[str] | None = None,
    colour: str = "",
) -> Scene:
    """A scene for a picture by itself; without `texts`, some show a digit or word."""
    if texts is None:
        drawn = rng.random()
        texts = DIGITS if drawn < DIGIT_SHARE else WORDS if drawn < DIGIT_SHARE + WORD_SHARE else ()
    return random_scene(rng, split, columns=columns, texts=texts, colour=colour)


def _pair(rng: random.Random, split: str) -> tuple[Scene, Scene]:
    """Two square scenes; the first, the second or none has more things, as likely each."""
    more = rng.randrange(3)
    if more == 0:
        counts = [rng.randint(1, 5)] * 2
    else:
        counts = sorted(rng.sample(range(1, 6), 2), reverse=more == 1)
    first, second = (random_scene(rng, split, count=count) for count in counts)
    return first, second


def _about(
    scene: Scene, rng: random.Random, colour: str = "", more: Mapping[str, float] = NO_MORE
) -> list[Question]:
    """One to four different questions about a scene; a description comes last."""
    number = rng.choices((1, 2, 3, 4), (1, 1, 4, 4))[0]
    weights = [weight * more.get(kind, 1) for kind, weight in WEIGHTS.items()]
    found: list[Question] = []
    if scene.text and not colour:
        kind = "digit" if scene.digit else "word"
        found.append(Question(kind, text=scene.text))
    for _ in range(20):
        if len(found) >= number:
            break
        (kind,) = rng.choices(list(WEIGHTS), weights)
        if colour and kind not in (*questions.COLOUR_KINDS, "follow_up"):
            continue
        question = questions.ask(kind, scene, rng, colour)
        told, kinds = [_told(other) for other in found], [other.kind for other in found]
        most = 1 if kind == "count" else 2
        if question and _told(question) not in told and kinds.count(kind) < most:
            found.append(question)
    rng.shuffle(found)
    # What stands in an earlier answer need not be looked for in the picture.
    return sorted(found, key=lambda question: question.kind == "describe")


def _told(question: Question) -> Question:
    """What a question lets one know, whatever name it gives to the thing asked about."""
    question = question.first or question
    return replace(question, colour="") if question.kind in ("where", "size") else question


def _made_up(rng: random.Random) -> str:
    """A word of letters, so that rare pieces of words are learned too."""
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


def _row(scenes: tuple[Scene, ...], asked: Sequence[Question], rng: random.Random) -> Row:
    language = rng.choice(list(LANGUAGES))
    said: list[Said] = []
    for question in asked:
        if said and rng.random() < SWITCH_SHARE:
            language = rng.choice([name for name in LANGUAGES if name != language])
        said += say(question, language, rng)
    return Row(scenes, {"conversations": _conversation(scenes, said)})


def _conversation(scenes: Sequence[Scene], said: Sequence[Said]) -> list[dict[str, str]]:
    """The turns, the pictures before the first."""
    turns: list[dict[str, str]] = []
    for number, each in enumerate(said):
        before = "" if number else "<image>\n" * len(scenes)
        turns.append({"from": "human", "value": before + each.question})
        turns.append({"from": "gpt", "value": each.answer})
    return turns
