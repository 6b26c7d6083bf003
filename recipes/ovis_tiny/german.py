"""Answers about pictures in German; the phrasings of questions are in german.toml."""

from recipes.ovis_tiny.german_grammar import (
    COLOUR_WORDS,
    PLACE_WORDS,
    SIZE_WORDS,
    definite_accusative,
    definite_nominative,
    indefinite_accusative,
    indefinite_nominative,
    inflect_adjective,
    pronoun_accusative,
    pronoun_nominative,
)
from recipes.ovis_tiny.questions import Question
from recipes.ovis_tiny.scenes import Thing

NUMBERS = "null eins zwei drei vier fünf sechs sieben acht neun zehn".split()

_NTH = {"first": "erste", "second": "zweite"}
_WITH_MORE = {1: "erste", 2: "zweite"}


def template_slots(question: Question) -> dict[str, str]:
    """Return the values for the slots of a question's templates."""
    q = question
    found = {"nth": _NTH.get(q.asked, ""), "text": q.text}
    if q.colour:
        colour = COLOUR_WORDS[q.colour]
        found |= {
            "colour": colour,
            "colour_e": inflect_adjective(colour, "e"),
            "colour_en": inflect_adjective(colour, "en"),
        }
    if q.shape:
        # A "colour" question must not contain its answer.
        named = "" if q.kind == "colour" else q.colour
        found |= {
            "the": definite_nominative(q.shape, named),
            "the_object": definite_accusative(q.shape, named),
        }
        found |= {"it": pronoun_nominative(q.shape), "it_object": pronoun_accusative(q.shape)}
    if q.shape and q.colour:
        found["a"] = indefinite_accusative(q.shape, COLOUR_WORDS[q.colour])
    return found


def full_answer(question: Question) -> str:
    """Return the answer as a full sentence."""
    q = question
    colour = COLOUR_WORDS.get(q.colour, "")
    match q.kind:
        case "shape":
            return (
                f"Die {inflect_adjective(colour, 'e')} Form ist {indefinite_nominative(q.shape)}."
            )
        case "colour":
            return f"{_capitalize(definite_nominative(q.shape))} ist {colour}."
        case "count":
            return f"Es gibt {_shapes(q.number)}."
        case "count_one":
            return f"Es gibt im {_NTH[q.asked]}n Bild {_shapes(q.number)}."
        case "count_colour" if q.number < 2:
            return f"{'Eine' if q.number else 'Keine'} Form ist {colour}."
        case "count_colour":
            return f"{_capitalize(_shapes(q.number))} sind {colour}."
        case "exists" if q.yes:
            return f"Ja, es gibt {indefinite_accusative(q.shape, colour)}."
        case "exists":
            return f"Nein, es gibt k{indefinite_accusative(q.shape, colour)}."
        case "where":
            return (
                f"{_capitalize(definite_nominative(q.shape, q.colour))} ist {PLACE_WORDS[q.place]}."
            )
        case "size":
            return (
                f"{_capitalize(definite_nominative(q.shape, q.colour))} ist {SIZE_WORDS[q.size]}."
            )
        case "digit":
            return f"Die Ziffer ist {q.text}."
        case "word":
            return f"Das Wort ist {q.text}."
        case "compare" if q.number:
            return f"Das {_WITH_MORE[q.number]} Bild zeigt mehr Formen."
        case "compare":
            return "Beide Bilder zeigen gleich viele Formen."
        case "describe":
            return (
                f"Es gibt {_enumerate([f'{_full_name(t)} {PLACE_WORDS[p]}' for t, p in q.things])}."
            )
        case "follow_up":
            found = colour or SIZE_WORDS.get(q.size) or PLACE_WORDS[q.place]
            return f"{_capitalize(pronoun_nominative(q.shape))} ist {found}."
        case "echo":
            return f"{q.text}."
    raise ValueError(f"question kind {q.kind!r} has no answer template")


def short_answer(question: Question) -> str:
    """Return the answer in as few words as possible."""
    q = question
    match q.kind:
        case "shape":
            return f"{_capitalize(indefinite_nominative(q.shape))}."
        case "count" | "count_one":
            return f"{_capitalize(_number(q.number))}."
        case "count_colour":
            return f"{_capitalize(_number(q.number))}." if q.number else "Keine."
        case "exists":
            return "Ja." if q.yes else "Nein."
        case "colour" | "size" | "where" | "follow_up":
            found = SIZE_WORDS.get(q.size) or PLACE_WORDS.get(q.place) or COLOUR_WORDS[q.colour]
            return f"{_capitalize(found)}."
        case "compare":
            return f"Das {_WITH_MORE[q.number]}." if q.number else "Beide."
        case "describe":
            names = [indefinite_nominative(t.shape, t.colour) for t, _ in q.things]
            return f"{_capitalize(_enumerate(names))}."
    return f"{q.text}."


def _number(number: int) -> str:
    """The word for a number of shapes."""
    return "eine" if number == 1 else NUMBERS[number]


def _shapes(number: int) -> str:
    return f"{_number(number)} {'Form' if number == 1 else 'Formen'}"


def _full_name(thing: Thing) -> str:
    return indefinite_accusative(thing.shape, SIZE_WORDS[thing.size], COLOUR_WORDS[thing.colour])


def _enumerate(parts: list[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} und {last}" if most else last


def _capitalize(text: str) -> str:
    return text[0].upper() + text[1:]
