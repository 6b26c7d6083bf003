"""German words, and as much grammar as a named shape needs: gender, case and endings."""

COLOURS = {
    "red": "rot",
    "green": "grün",
    "blue": "blau",
    "yellow": "gelb",
    "purple": "lila",
    "orange": "orange",
    "black": "schwarz",
    "pink": "rosa",
}
SIZES = {"big": "groß", "small": "klein"}
PLACES = {
    "top left": "oben links",
    "top": "oben",
    "top right": "oben rechts",
    "left": "links",
    "middle": "in der Mitte",
    "right": "rechts",
    "bottom left": "unten links",
    "bottom": "unten",
    "bottom right": "unten rechts",
    "left half": "in der linken Hälfte",
    "right half": "in der rechten Hälfte",
}

_UNBENDING = ("lila", "orange", "rosa")
"""Adjectives that take no ending."""

_NOUNS = {
    "circle": ("der", "Kreis"),
    "square": ("das", "Quadrat"),
    "triangle": ("das", "Dreieck"),
    "star": ("der", "Stern"),
    "cross": ("das", "Kreuz"),
    "ring": ("der", "Ring"),
    "heart": ("das", "Herz"),
    "diamond": ("die", "Raute"),
}

# After ein and kein an adjective shows the gender that the article hides.
_BARE = {"der": "er", "das": "es", "die": "e"}


def bend(adjective: str, ending: str) -> str:
    """An adjective, in German, with an ending."""
    return adjective if adjective in _UNBENDING else adjective + ending


def the(shape: str, colour: str = "") -> str:
    """Der rote Kreis, das rote Quadrat, die rote Raute; without a colour: der Kreis."""
    article, noun = _NOUNS[shape]
    return _join(article, _bent(colour, "e"), noun)


def the_object(shape: str, colour: str = "") -> str:
    """The accusative: den roten Kreis, das rote Quadrat, die rote Raute."""
    article, noun = _NOUNS[shape]
    if article == "der":
        return _join("den", _bent(colour, "en"), noun)
    return the(shape, colour)


def one(shape: str, colour: str = "") -> str:
    """Ein roter Kreis, ein rotes Quadrat, eine rote Raute."""
    article, noun = _NOUNS[shape]
    return _join("eine" if article == "die" else "ein", _bent(colour, _BARE[article]), noun)


def one_object(shape: str, *adjectives: str) -> str:
    """The accusative, adjectives in German: einen roten Kreis, ein rotes Quadrat, eine rote Raute.

    With "kein" before it in mind: einen, ein and eine become keinen, kein and keine.
    """
    article, noun = _NOUNS[shape]
    begin, ending = {"der": ("einen", "en"), "das": ("ein", "es"), "die": ("eine", "e")}[article]
    return _join(begin, *[bend(adjective, ending) for adjective in adjectives], noun)


def it(shape: str) -> str:
    """Er, es or sie."""
    return {"der": "er", "das": "es", "die": "sie"}[_NOUNS[shape][0]]


def it_object(shape: str) -> str:
    """The accusative: ihn, es or sie."""
    return {"der": "ihn", "das": "es", "die": "sie"}[_NOUNS[shape][0]]


def _bent(colour: str, ending: str) -> str:
    return bend(COLOURS[colour], ending) if colour else ""


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)
