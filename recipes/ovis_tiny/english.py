"""Answers about pictures in English; the phrasings of questions are in english.toml."""

from recipes.ovis_tiny.questions import Question
from recipes.ovis_tiny.scenes import Thing

NUMBERS = "zero one two three four five six seven eight nine ten".split()

_PLACES = {
    "top left": "at the top left",
    "top": "at the top",
    "top right": "at the top right",
    "left": "on the left",
    "middle": "in the middle",
    "right": "on the right",
    "bottom left": "at the bottom left",
    "bottom": "at the bottom",
    "bottom right": "at the bottom right",
    "left half": "in the left half",
    "right half": "in the right half",
}
_WITH_MORE = {1: "first", 2: "second"}


def template_slots(question: Question) -> dict[str, str]:
    """Return the values for the slots of a question's templates."""
    return {
        "colour": question.colour,
        "the": _the(question),
        "a": _a(f"{question.colour} {question.shape}"),
        "nth": question.asked,
        "text": question.text,
    }


def full_answer(question: Question) -> str:
    """Return the answer as a full sentence."""
    q = question
    match q.kind:
        case "shape":
            return f"The {q.colour} shape is {_a(q.shape)}."
        case "colour":
            return f"The {q.shape} is {q.colour}."
        case "count" if q.number == 1:
            return "There is one shape."
        case "count":
            return f"There are {NUMBERS[q.number]} shapes."
        case "count_one":
            return (
                f"{full_answer(Question('count', number=q.number))[:-1]} in the {q.asked} picture."
            )
        case "count_colour" if q.number < 2:
            return f"{'One' if q.number else 'No'} shape is {q.colour}."
        case "count_colour":
            return f"{NUMBERS[q.number].capitalize()} shapes are {q.colour}."
        case "exists" if q.yes:
            return f"Yes, there is {_a(f'{q.colour} {q.shape}')}."
        case "exists":
            return f"No, there is no {q.colour} {q.shape}."
        case "where":
            return f"{_capitalize(_the(q))} is {_PLACES[q.place]}."
        case "size":
            return f"{_capitalize(_the(q))} is {q.size}."
        case "digit" | "word":
            return f"The {q.kind} is {q.text}."
        case "compare" if q.number:
            return f"The {_WITH_MORE[q.number]} picture has more shapes."
        case "compare":
            return "Both pictures have the same number of shapes."
        case "describe":
            return f"There is {_enumerate([f'{_full_name(t)} {_PLACES[p]}' for t, p in q.things])}."
        case "follow_up":
            return f"It is {q.colour or q.size or _PLACES[q.place]}."
        case "echo":
            return f"{q.text}."
    raise ValueError(f"question kind {q.kind!r} has no answer template")


def short_answer(question: Question) -> str:
    """Return the answer in as few words as possible."""
    q = question
    match q.kind:
        case "shape":
            return f"{_capitalize(_a(q.shape))}."
        case "count" | "count_one":
            return f"{_capitalize(NUMBERS[q.number])}."
        case "count_colour":
            return f"{_capitalize(NUMBERS[q.number])}." if q.number else "None."
        case "exists":
            return "Yes." if q.yes else "No."
        case "colour" | "size" | "where" | "follow_up":
            return f"{_capitalize(q.size or _PLACES.get(q.place) or q.colour)}."
        case "compare":
            return f"The {_WITH_MORE[q.number]}." if q.number else "Both."
        case "describe":
            return f"{_capitalize(_enumerate([_a(f'{t.colour} {t.shape}') for t, _ in q.things]))}."
    return f"{q.text}."


def _the(question: Question) -> str:
    # A "colour" question must not contain its answer.
    if not question.colour or question.kind == "colour":
        return f"the {question.shape}"
    return f"the {question.colour} {question.shape}"


def _a(noun: str) -> str:
    return f"an {noun}" if noun[:1] in "aeiou" else f"a {noun}"


def _full_name(thing: Thing) -> str:
    return _a(f"{thing.size} {thing.colour} {thing.shape}")


def _enumerate(parts: list[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def _capitalize(text: str) -> str:
    return text[0].upper() + text[1:]
