"""What can be asked about a scene, and what is true: free of any language.

A `Question` holds what is asked and what the answer is; `english` and `german` say both.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from recipes.ovis_tiny.scenes import COLOURS, SHAPES, SQUARE, Scene, Thing

PICTURE_KINDS = (
    "shape",
    "colour",
    "count",
    "count_colour",
    "exists",
    "where",
    "size",
    "digit",
    "word",
    "describe",
    "follow_up",
)
"""Kinds that are asked about one picture."""

KINDS = (*PICTURE_KINDS, "compare", "text")
"""Every kind that is scored."""

COLOUR_KINDS = ("shape", "colour", "count_colour", "exists", "where", "size", "describe")
"""Kinds whose question or answer can name the colour of a thing."""

PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
"""The names of the cells of a square picture."""

MOST_DESCRIBED = 4
"""A picture with more things is not asked to be described; the answer would be too long."""

TOPICS = {
    "sum": tuple(f"{a} {b}" for a in range(1, 6) for b in range(1, 6)),
    "opposite": tuple("hot old long day fast light full rich loud wet thick high".split()),
    "next_day": ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
    "legs": ("dog", "bird", "spider", "ant", "horse", "cat"),
    "colour": ("sky", "grass", "snow", "coal", "banana", "tomato"),
    "hello": ("",),
    "morning": ("",),
    "bye": ("",),
    "thanks": ("",),
    "who": ("",),
}
"""What is asked without a picture."""


@dataclass(frozen=True)
class Question:
    """What is asked, and the facts that its answer states; unused fields are empty.

    Attributes:
      kind: one of KINDS, or "count_one" (of the things in one of two pictures) or "echo" (repeat a
        word), which only help in training.
      asked: which property a "follow_up" asks for, which picture "count_one" counts in, or which
        of TOPICS a "text" is about.
      shape: the shape asked about or found.
      colour: the colour asked about or found; empty where a thing is named by its shape alone.
      size: one of SIZES.
      place: one of PLACES, or "left half" or "right half" of a wide picture.
      number: a count; the picture with more things, 1 or 2, or 0 if none has.
      yes: whether what is asked is so.
      text: a digit, a word or an entry of TOPICS.
      things: what is described, in the order of the description.
      first: the question that a "follow_up" follows.
    """

    kind: str
    asked: str = ""
    shape: str = ""
    colour: str = ""
    size: str = ""
    place: str = ""
    number: int = 0
    yes: bool = False
    text: str = ""
    things: tuple[tuple[Thing, str], ...] = ()
    first: "Question | None" = None

    @property
    def phrasing(self) -> str:
        """The entry of a language's PHRASES that asks this."""
        return f"{self.kind} {self.asked}" if self.kind in ("follow_up", "text") else self.kind


def place_of(thing: Thing, columns: int) -> str:
    """Where a thing is in a picture of so many columns."""
    if columns == SQUARE:
        return PLACES[thing.row][thing.column]
    return "left half" if thing.column < SQUARE else "right half"


def ask(kind: str, scene: Scene, rng: random.Random, colour: str = "") -> Question | None:
    """Ask something of one of PICTURE_KINDS that has one true answer, or None if nothing has.

    With a `colour`, the question or its answer names that colour; the kind is then one of
    COLOUR_KINDS or "follow_up".
    """
    return _ASK[kind](scene, rng, colour)


def compare(first: Scene, second: Scene) -> Question:
    """Ask which of two pictures has more things."""
    difference = len(first.things) - len(second.things)
    return Question("compare", number=0 if not difference else 1 if difference > 0 else 2)


def count_one(first: Scene, second: Scene, rng: random.Random) -> Question:
    """Ask how many things one of two pictures has."""
    asked, scene = rng.choice((("first", first), ("second", second)))
    return Question("count_one", asked, number=len(scene.things))


def text_only(rng: random.Random) -> Question:
    """Ask something without a picture; every entry of TOPICS is as likely."""
    entries = [(topic, text) for topic, texts in TOPICS.items() for text in texts]
    topic, text = rng.choice(entries)
    return Question("text", topic, text=text)


def describe(scene: Scene) -> Question:
    """Ask for all things of a picture, in reading order, one half of a wide picture after another.

    Other than `ask`, it is not afraid of long answers.
    """
    things = [(thing, place_of(thing, scene.columns)) for thing in scene.things]
    if scene.columns != SQUARE:
        things.sort(key=lambda pair: pair[1])
    return Question("describe", things=tuple(things))


def _references(scene: Scene, colour: str) -> list[tuple[Thing, str]]:
    """Things that can be named without doubt, each with the colour in its name, which may be ""."""
    shapes = Counter(thing.shape for thing in scene.things)
    pairs = Counter((thing.shape, thing.colour) for thing in scene.things)
    found: list[tuple[Thing, str]] = []
    for thing in scene.things:
        if pairs[thing.shape, thing.colour] == 1 and colour in ("", thing.colour):
            found.append((thing, thing.colour))
        if shapes[thing.shape] == 1 and not colour:
            found.append((thing, ""))
    return found


def _shape(scene: Scene, rng: random.Random, colour: str) -> Question | None:
    colours = Counter(thing.colour for thing in scene.things)
    found = [t for t in scene.things if colours[t.colour] == 1 and colour in ("", t.colour)]
    if not found:
        return None
    thing = rng.choice(found)
    return Question("shape", shape=thing.shape, colour=thing.colour)


def _colour(scene: Scene, rng: random.Random, colour: str) -> Question | None:
    shapes = Counter(thing.shape for thing in scene.things)
    found = [t for t in scene.things if shapes[t.shape] == 1 and colour in ("", t.colour)]
    if not found:
        return None
    thing = rng.choice(found)
    return Question("colour", shape=thing.shape, colour=thing.colour)


def _count(scene: Scene, rng: random.Random, colour: str) -> Question | None:
    return Question("count", number=len(scene.things))


def _count_colour(scene: Scene, rng: random.Random, colour: str) -> Question | None:
    counts = Counter(thing.colour for thing in scene.things)
    if not colour:
        absent = [each for each in COLOURS if not counts[each]]
        if absent and rng.random() < 0.15:
            colour = rng.choice(absent)
        else:
            # Else most answers would be one.
            (colour,) = rng.choices(list(counts), [n**2 for n in counts.values()])
    return Question("count_colour", colour=colour, number=counts[colour])


def _exists(scene: Scene, rng: random.Random, colour: str) -> Question | None:
    present = {(thing.shape, thing.colour) for thing in scene.things}
    yes = rng.random() < 0.5
    if yes:
        options = [pair for pair in present if colour in ("", pair[1])]
    else:
        colours = (colour,) if colour else COLOURS
        options = [(s, c) for s in SHAPES for c in colours if (s, c) not in present]
        # Half true is harder to deny than all wrong.
        if rng.random() < 0.9:
            shapes, hues = {shape for shape, _ in present}, {hue for _, hue in present}
            near = [(s, c) for s, c in options if (c in hues) != (s in shapes)]
            both = [(s, c) for s, c in options if c in hues and s in shapes]
            options = (both if both and rng.random() < 0.4 else near) or options
    if not options:
        return None
    shape, hue = rng.choice(sorted(options))
    return Question("exists", shape=shape, colour=hue, yes=yes)


def _where(scene: Scene, rng: random.Random, colour: str) -> Question | None:
    found = _references(scene, colour)
    if not found:
        return None
    thing, hue = rng.choice(found)
    return Question("where", shape=thing.shape, colour=hue, place=place_of(thing, scene.columns))


def _size(scene: Scene, rng: random.Random, colour: str) -> Question | None:
    found = _references(scene, colour)
    if not found:
        return None
    thing, hue = rng.choice(found)
    return Question("size", shape=thing.shape, colour=hue, size=thing.size)


def _digit(scene: Scene, rng: random.Random, colour: str) -> Question | None:
    return Question("digit", text=scene.digit) if scene.digit else None


def _word(scene: Scene, rng: random.Random, colour: str) -> Question | None:
    return Question("word", text=scene.word) if scene.word else None


def _describe(scene: Scene, rng: random.Random, colour: str) -> Question | None:
    if scene.columns != SQUARE or len(scene.things) > MOST_DESCRIBED:
        return None
    return describe(scene)


def _follow_up(scene: Scene, rng: random.Random, colour: str) -> Question | None:
    """A second question about the thing of a first one, for what the first did not tell."""
    first = ask(rng.choice(("shape", "colour", "size", "where")), scene, rng, colour)
    if first is None:
        return None
    thing = _subject(first, scene)
    options = {
        "colour": "" if first.colour else thing.colour,
        "size": "" if first.size else thing.size,
        "place": "" if first.place else place_of(thing, scene.columns),
    }
    asked = rng.choice([name for name, value in options.items() if value])
    follow_up = Question("follow_up", asked, shape=thing.shape, first=first)
    return replace(follow_up, **{asked: options[asked]})


def _subject(question: Question, scene: Scene) -> Thing:
    """The one thing that a question is about."""
    (thing,) = [
        thing
        for thing in scene.things
        if question.colour in ("", thing.colour)
        and (question.kind == "shape" or question.shape == thing.shape)
    ]
    return thing


_ASK: dict[str, Callable[[Scene, random.Random, str], Question | None]] = {
    "shape": _shape,
    "colour": _colour,
    "count": _count,
    "count_colour": _count_colour,
    "exists": _exists,
    "where": _where,
    "size": _size,
    "digit": _digit,
    "word": _word,
    "describe": _describe,
    "follow_up": _follow_up,
}
