"""Questions about pictures and their answers in German."""

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
from recipes.ovis_tiny.phrasings import Phrasings
from recipes.ovis_tiny.questions import Question
from recipes.ovis_tiny.scenes import Thing

NUMBERS = "null eins zwei drei vier fünf sechs sieben acht neun zehn".split()

OPENINGS = ("Schau dir das Bild an. ", "Schau genau hin. ", "Bitte antworte. ")
"""Sentences that may precede a question about a picture."""

PHRASES = {
    "shape": Phrasings(
        (
            "Welche Form ist {colour}?",
            "Was ist die {colour_e} Form?",
            "Nenne die {colour_e} Form.",
            "Welche Form im Bild ist {colour}?",
            "Sag mir, welche Form {colour} ist.",
            "Was für eine Form ist {colour}?",
        ),
        ("Was ist die {colour_e} Form im Bild?", "Kannst du mir sagen, welche Form {colour} ist?"),
    ),
    "colour": Phrasings(
        (
            "Welche Farbe hat {the}?",
            "Was für eine Farbe hat {the}?",
            "Welche Farbe hat {the} im Bild?",
            "Sag mir, welche Farbe {the} hat.",
            "Nenne die Farbe, die {the} hat.",
            "In welcher Farbe siehst du {the_object}?",
        ),
        ("Kannst du mir sagen, welche Farbe {the} hat?", "Was für eine Farbe hat {the} im Bild?"),
    ),
    "count": Phrasings(
        (
            "Wie viele Formen gibt es?",
            "Wie viele Formen siehst du?",
            "Wie viele Formen sind im Bild?",
            "Zähle die Formen.",
            "Kannst du die Formen zählen?",
            "Was ist die Anzahl der Formen?",
        ),
        ("Wie viele Formen kannst du sehen?", "Wie viele Formen siehst du im Bild?"),
    ),
    "count_colour": Phrasings(
        (
            "Wie viele Formen sind {colour}?",
            "Wie viele {colour_e} Formen gibt es?",
            "Wie viele {colour_e} Formen siehst du?",
            "Zähle die {colour_en} Formen.",
            "Wie viele der Formen sind {colour}?",
            "Was ist die Anzahl der {colour_en} Formen?",
        ),
        ("Wie viele {colour_e} Formen sind im Bild?", "Kannst du die {colour_en} Formen zählen?"),
    ),
    "exists": Phrasings(
        (
            "Gibt es {a}?",
            "Gibt es {a} im Bild?",
            "Siehst du {a}?",
            "Kannst du {a} sehen?",
            "Zeigt das Bild {a}?",
            "Sag mir, ob es {a} gibt.",
        ),
        ("Siehst du {a} im Bild?", "Kannst du mir sagen, ob es {a} gibt?"),
    ),
    "where": Phrasings(
        (
            "Wo ist {the}?",
            "Wo im Bild ist {the}?",
            "Wo siehst du {the_object}?",
            "Wo kannst du {the_object} sehen?",
            "Sag mir, wo {the} ist.",
            "An welchem Ort ist {the}?",
        ),
        ("Kannst du mir sagen, wo {the} ist?", "Wo im Bild siehst du {the_object}?"),
    ),
    "size": Phrasings(
        (
            "Wie groß ist {the}?",
            "Ist {the} groß oder klein?",
            "Welche Größe hat {the}?",
            "Was für eine Größe hat {the}?",
            "Wie groß ist {the} im Bild?",
            "Sag mir, wie groß {the} ist.",
        ),
        ("Kannst du mir sagen, wie groß {the} ist?", "Welche Größe hat {the} im Bild?"),
    ),
    "digit": Phrasings(
        (
            "Welche Ziffer ist im Bild?",
            "Welche Ziffer siehst du?",
            "Was ist die Ziffer?",
            "Welche Ziffer zeigt das Bild?",
            "Lies die Ziffer.",
            "Nenne die Ziffer.",
        ),
        ("Welche Ziffer siehst du im Bild?", "Kannst du die Ziffer lesen?"),
    ),
    "word": Phrasings(
        (
            "Welches Wort ist im Bild?",
            "Welches Wort siehst du?",
            "Was ist das Wort?",
            "Welches Wort zeigt das Bild?",
            "Kannst du das Wort lesen?",
            "Nenne das Wort.",
        ),
        ("Welches Wort siehst du im Bild?", "Lies das Wort."),
    ),
    "describe": Phrasings(
        (
            "Beschreibe das Bild.",
            "Was ist im Bild?",
            "Was siehst du?",
            "Was zeigt das Bild?",
            "Was kannst du sehen?",
            "Sag mir, was im Bild ist.",
        ),
        ("Was kannst du im Bild sehen?", "Was siehst du im Bild?"),
    ),
    "compare": Phrasings(
        (
            "Welches Bild zeigt mehr Formen?",
            "Welches Bild hat mehr Formen?",
            "Welches der Bilder zeigt mehr Formen?",
            "Welches der beiden Bilder hat mehr Formen?",
            "In welchem Bild sind mehr Formen?",
            "Gibt es im ersten oder im zweiten Bild mehr Formen?",
        ),
        ("Welches der beiden Bilder zeigt mehr Formen?", "Welches der Bilder hat mehr Formen?"),
    ),
    "count_one": Phrasings(
        ("Wie viele Formen sind im {nth}n Bild?", "Wie viele Formen hat das {nth} Bild?"), ()
    ),
    "echo": Phrasings(
        (
            "Sag das Wort {text}.",
            "Bitte sag {text}.",
            "Kannst du {text} sagen?",
            "Wiederhole: {text}",
        ),
        (),
    ),
    "follow_up colour": Phrasings(
        (
            "Und welche Farbe hat {it}?",
            "Welche Farbe hat {it}?",
            "Und was für eine Farbe hat {it}?",
            "Welche Farbe hat {it} im Bild?",
            "Sag mir, welche Farbe {it} hat.",
            "Und nenne die Farbe, die {it} hat.",
        ),
        ("Was für eine Farbe hat {it}?", "Und welche Farbe hat {it} im Bild?"),
    ),
    "follow_up size": Phrasings(
        (
            "Und wie groß ist {it}?",
            "Wie groß ist {it}?",
            "Und welche Größe hat {it}?",
            "Ist {it} groß oder klein?",
            "Wie groß ist {it} im Bild?",
            "Sag mir, wie groß {it} ist.",
        ),
        ("Und ist {it} groß oder klein?", "Welche Größe hat {it}?"),
    ),
    "follow_up place": Phrasings(
        (
            "Und wo ist {it}?",
            "Wo ist {it}?",
            "Und wo im Bild ist {it}?",
            "Wo kannst du {it_object} sehen?",
            "Und wo siehst du {it_object}?",
            "Sag mir, wo {it} ist.",
        ),
        ("Wo im Bild ist {it}?", "Und wo kannst du {it_object} sehen?"),
    ),
}

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
