"""Questions about scenes and their answers, independent of a language.

A `Question` holds the facts of a question and of its answer; `english` and `german` phrase both.
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
"""Kinds of questions about one picture."""

KINDS = (*PICTURE_KINDS, "compare", "text")
"""Kinds of questions that are scored."""

COLOUR_KINDS = ("shape", "colour", "count_colour", "exists", "where", "size", "describe")
"""Kinds whose question or answer can mention the colour of a thing."""

PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
"""Names of the cells of a square picture."""

MAX_DESCRIBED_THINGS = 4
"""Maximum number of things in a picture to describe, which limits the length of the answer."""

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
"""Topics of questions without a picture, and their entries."""


@dataclass(frozen=True)
class Question:
    """The facts of a question and of its answer; unused fields are empty.

    Attributes:
      kind: one of KINDS, or a kind for training only: "count_one" counts the things in one of two
        pictures, "echo" repeats a word.
      asked: the property that a "follow_up" asks for, the picture that "count_one" counts in, or
        the topic of a "text".
      shape: the shape in the question or in the answer.
      colour: the colour in the question or in the answer; empty if the shape alone names a thing.
      size: one of SIZES.
      place: one of PLACES, or "left half" or "right half" of a wide picture.
      number: a count; for "compare", the picture with more things (1 or 2), or 0 if neither.
      yes: answer to a yes-no question.
      text: a digit, a word or an entry of TOPICS.
      things: things to describe and their places, in order.
      first: the question before a "follow_up".
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
        """Key of the phrasings in a language's PHRASES."""
        return f"{self.kind} {self.asked}" if self.kind in ("follow_up", "text") else self.kind


def place_name(thing: Thing, columns: int) -> str:
    """Return the name of the place of a thing in a picture with `columns` columns."""
    if columns == SQUARE:
        return PLACES[thing.row][thing.column]
    return "left half" if thing.column < SQUARE else "right half"


def ask_about_scene(
    kind: str, scene: Scene, rng: random.Random, colour: str = ""
) -> Question | None:
    """Make a question with exactly one true answer; None if the scene has no such question.

    Args:
      kind: one of PICTURE_KINDS; with a colour, one of COLOUR_KINDS or "follow_up".
      scene: the scene.
      rng: source of all random choices.
      colour: colour that the question or its answer mentions.
    """
    return _ASK[kind](scene, rng, colour)


def compare_counts(first: Scene, second: Scene) -> Question:
    """Make a question about which of two pictures has more things."""
    difference = len(first.things) - len(second.things)
    return Question("compare", number=0 if not difference else 1 if difference > 0 else 2)


def ask_count_in_one_picture(first: Scene, second: Scene, rng: random.Random) -> Question:
    """Make a question about the number of things in one of two pictures."""
    asked, scene = rng.choice((("first", first), ("second", second)))
    return Question("count_one", asked, number=len(scene.things))


def random_small_talk_question(rng: random.Random) -> Question:
    """Make a question without a picture; all entries of TOPICS are equally probable."""
    entries = [(topic, text) for topic, texts in TOPICS.items() for text in texts]
    topic, text = rng.choice(entries)
    return Question("text", topic, text=text)


def ask_description(scene: Scene) -> Question:
    """Make a request to describe all things of a picture in reading order, half by half if wide.

    Unlike `ask_about_scene`, it does not limit the length of the answer.
    """
    things = [(thing, place_name(thing, scene.columns)) for thing in scene.things]
    if scene.columns != SQUARE:
        things.sort(key=lambda pair: pair[1])
    return Question("describe", things=tuple(things))


def _references(scene: Scene, colour: str) -> list[tuple[Thing, str]]:
    """Things with an unambiguous name, each with the colour in its name, which may be ""."""
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
            # With equal weights, most answers would be one.
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
        # Combinations that are partly true are harder to deny.
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
    return Question("where", shape=thing.shape, colour=hue, place=place_name(thing, scene.columns))


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
    if scene.columns != SQUARE or len(scene.things) > MAX_DESCRIBED_THINGS:
        return None
    return ask_description(scene)


def _follow_up(scene: Scene, rng: random.Random, colour: str) -> Question | None:
    """A second question about the same thing, for a fact that the first did not reveal."""
    first = ask_about_scene(rng.choice(("shape", "colour", "size", "where")), scene, rng, colour)
    if first is None:
        return None
    thing = _subject(first, scene)
    options = {
        "colour": "" if first.colour else thing.colour,
        "size": "" if first.size else thing.size,
        "place": "" if first.place else place_name(thing, scene.columns),
    }
    asked = rng.choice([name for name, value in options.items() if value])
    follow_up = Question("follow_up", asked, shape=thing.shape, first=first)
    return replace(follow_up, **{asked: options[asked]})


def _subject(question: Question, scene: Scene) -> Thing:
    """The thing that a question is about."""
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
