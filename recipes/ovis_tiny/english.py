"""Questions about pictures and their answers in English."""

from recipes.ovis_tiny.phrasings import Phrasings
from recipes.ovis_tiny.questions import Question
from recipes.ovis_tiny.scenes import Thing

NUMBERS = "zero one two three four five six seven eight nine ten".split()

OPENINGS = ("Look at the picture. ", "Look closely. ", "Please answer. ")
"""Sentences that may precede a question about a picture."""

PHRASES = {
    "shape": Phrasings(
        (
            "What shape is {colour}?",
            "Which shape is {colour}?",
            "What is the {colour} shape?",
            "Name the {colour} shape.",
            "Which shape in the picture is {colour}?",
            "Tell me which shape is {colour}.",
        ),
        ("What is the {colour} shape in the picture?", "Can you tell me which shape is {colour}?"),
    ),
    "colour": Phrasings(
        (
            "What colour is {the}?",
            "Which colour is {the}?",
            "What is the colour of {the}?",
            "Which colour does {the} have?",
            "Name the colour of {the}.",
            "Can you tell me the colour of {the}?",
        ),
        ("What colour does {the} have?", "Can you name the colour of {the}?"),
    ),
    "count": Phrasings(
        (
            "How many shapes are there?",
            "How many shapes do you see?",
            "How many shapes are in the picture?",
            "Count the shapes.",
            "Can you count the shapes?",
            "What is the number of shapes?",
        ),
        ("How many shapes can you see?", "How many shapes do you see in the picture?"),
    ),
    "count_colour": Phrasings(
        (
            "How many shapes are {colour}?",
            "How many {colour} shapes are there?",
            "How many {colour} shapes do you see?",
            "Count the {colour} shapes.",
            "How many of the shapes are {colour}?",
            "What is the number of {colour} shapes?",
        ),
        ("How many {colour} shapes are in the picture?", "Can you count the {colour} shapes?"),
    ),
    "exists": Phrasings(
        (
            "Is there {a}?",
            "Is there {a} in the picture?",
            "Do you see {a}?",
            "Can you see {a}?",
            "Does the picture have {a}?",
            "Tell me if there is {a}.",
        ),
        ("Do you see {a} in the picture?", "Can you tell me if there is {a}?"),
    ),
    "where": Phrasings(
        (
            "Where is {the}?",
            "Where in the picture is {the}?",
            "Where is {the} in the picture?",
            "Where can you see {the}?",
            "Tell me where {the} is.",
            "In which place is {the}?",
        ),
        ("Where do you see {the}?", "Can you tell me where {the} is?"),
    ),
    "size": Phrasings(
        (
            "How big is {the}?",
            "Is {the} big or small?",
            "What size is {the}?",
            "What is the size of {the}?",
            "Which size does {the} have?",
            "Tell me how big {the} is.",
        ),
        ("Which size is {the}?", "Can you tell me the size of {the}?"),
    ),
    "digit": Phrasings(
        (
            "Which digit is in the picture?",
            "What digit do you see?",
            "What is the digit?",
            "Which digit can you see?",
            "Read the digit.",
            "Tell me the digit.",
        ),
        ("What digit is in the picture?", "Can you read the digit?"),
    ),
    "word": Phrasings(
        (
            "Which word is in the picture?",
            "What word do you see?",
            "What is the word?",
            "Which word can you see?",
            "Can you read the word?",
            "Tell me the word.",
        ),
        ("What word is in the picture?", "Read the word."),
    ),
    "describe": Phrasings(
        (
            "Describe the picture.",
            "What is in the picture?",
            "What do you see?",
            "What do you see in the picture?",
            "What can you see?",
            "Tell me what is in the picture.",
        ),
        ("What can you see in the picture?", "Tell me what you see."),
    ),
    "compare": Phrasings(
        (
            "Which picture has more shapes?",
            "Which picture shows more shapes?",
            "Which of the pictures has more shapes?",
            "Which of the two pictures has more shapes?",
            "In which picture are more shapes?",
            "Are there more shapes in the first or in the second picture?",
        ),
        (
            "Which of the two pictures shows more shapes?",
            "In which of the pictures are more shapes?",
        ),
    ),
    "count_one": Phrasings(
        ("How many shapes are in the {nth} picture?", "How many shapes has the {nth} picture?"), ()
    ),
    "echo": Phrasings(
        ("Say the word {text}.", "Please say {text}.", "Can you say {text}?", "Repeat: {text}"), ()
    ),
    "follow_up colour": Phrasings(
        (
            "And what colour is it?",
            "What colour is it?",
            "And which colour is it?",
            "Which colour does it have?",
            "And what is its colour?",
            "Tell me its colour.",
        ),
        ("What is its colour?", "And which colour does it have?"),
    ),
    "follow_up size": Phrasings(
        (
            "And how big is it?",
            "How big is it?",
            "And what size is it?",
            "Is it big or small?",
            "And what is its size?",
            "Tell me how big it is.",
        ),
        ("And is it big or small?", "What is its size?"),
    ),
    "follow_up place": Phrasings(
        (
            "And where is it?",
            "Where is it?",
            "And where can you see it?",
            "Where in the picture is it?",
            "And in which place is it?",
            "Tell me where it is.",
        ),
        ("And where in the picture is it?", "Where can you see it?"),
    ),
}

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
